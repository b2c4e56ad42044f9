"""The ratio table, as cells, and as Markdown."""

from __future__ import annotations

from lite_attention.bench.results import RowResult, Run
from lite_attention.bench.targets import OURS, AverageVerdict, Verdict, ratio

NOTHING = "–"
LONGEST = 60  # characters of a reason in a cell; the JSON has all of it
CAPTION = "Ratios are a peer's time over ours: above 1, LiteAttention is faster. Times are medians."
SKIP_CAPTION = (
    "With lists, peers compute everything. Visited is the share of the visible tiles or pages that lists visit; ideal "
    "is that share of the time of our dense kernel, or of FA3 where it is faster. With votes, times are of a step on "
    "average."
)


def header(run: Run) -> list[str]:
    return [
        "row",
        "us",
        "rate",
        "of ceiling",
        *(["visited"] if has_lists(run) else []),
        *_columns(run),
        "needs",
        "verdict",
    ]


def caption(run: Run) -> str:
    return f"{CAPTION} {SKIP_CAPTION}" if has_lists(run) else CAPTION


def has_lists(run: Run) -> bool:
    return any(result.row.skip is not None for result in run.rows)


def cells(run: Run, result: RowResult) -> list[str]:
    """One row of the table, under `header`."""
    needs = ", ".join(str(target) for target in result.row.targets)
    if result.status != "measured":
        blank = [NOTHING] * (len(header(run)) - 3)
        return [result.row.name, *blank, needs, f"{result.status}: {result.reason}"]
    ours, microseconds = result.rate(OURS), result.microseconds
    return [
        result.row.name,
        f"{microseconds[OURS]:,.1f}",
        f"{result.rate_text(OURS)} {result.row.unit}",
        f"{ours / run.ceilings.of(result.row.bound):.0%}",
        *([NOTHING if result.visited is None else f"{result.visited:.1%}"] if has_lists(run) else []),
        *(_ratio(result, name) for name in _columns(run)),
        needs,
        judged(result),
    ]


def judged(result: RowResult) -> str:
    """What the targets of a row that was measured came to, in words."""
    return verdict(result.verdicts()) if result.row.targets else "nothing asked"


def verdict(found: list[Verdict]) -> str:
    """What some targets came to, in words."""
    if not found:
        return "not at full size"
    below = [f"below {one.target}: {one.ratio:.3f}" for one in found if one.met is False]
    unknown = [_unknown(one) for one in found if one.met is None]
    return ", ".join(below + unknown) or "meets"


def average_line(one: AverageVerdict) -> str:
    """An average, as a sentence."""
    against, beside = one.average.target.against, f" beside {', '.join(one.without)}" if one.without else ""
    if one.met is None:
        judged = f"not judged, as only {one.measured} of {one.rows} rows were measured{beside}"
    else:
        judged = "meets" if one.met else "below"
    found = against if one.ratio is None else f"{one.ratio:.3f} x {against}"
    return f"{one.average.rows} on average: {found}, needs {one.average.target.at_least:.2f}: {judged}"


def markdown(run: Run, picture: str | None) -> str:
    """The whole report. `picture` is the file beside it; None where nothing was timed."""
    name = run.environment["GPU"] if run.device == "cuda" else "the CPU"
    place = [f"| {key} | {value} |" for key, value in run.environment.items()]
    peers = [f"- {peer}: {identity}" for peer, identity in run.peers.items()]
    peers += [f"- {peer} took no part: {reason}" for peer, reason in run.missing.items()]
    lines = [
        f"# LiteAttention's benchmark on {name}",
        "",
        f"Written by `python -m lite_attention.bench`; [results.json](results.json) has everything. {caption(run)} "
        f"{run.repetitions} repetitions, in turns. Each result was checked before it was timed.",
        "",
        *([f"Sequences are {run.scale:g} times as long as the rows say.", ""] if run.scale != 1 else []),
        *([f"![Rates against the ceilings]({picture})", ""] if picture else []),
        "| | |",
        "|---|---|",
        *place,
        f"| ceilings | {run.ceilings} |",
        "",
        "Peers:",
        "",
        *(peers or ["- none"]),
        "",
        _line(header(run)),
        "|" + "---|" * len(header(run)),
        *(_line(cells(run, result)) for result in run.rows),
        "",
        *(f"- {average_line(one)}" for one in run.averages()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _unknown(one: Verdict) -> str:
    against = one.target.against
    return f"{against} not judged without {', '.join(one.without)}" if one.without else f"no {against}"


def _columns(run: Run) -> list[str]:
    """Peers, and what else there is beside us in some row: own times, the ideal."""
    others = [name for result in run.rows for name in (*result.microseconds, *result.absent) if name != OURS]
    return list(dict.fromkeys([*run.peers, *others]))


def _ratio(result: RowResult, name: str) -> str:
    if name in result.absent:
        reason = result.absent[name]
        return reason if len(reason) <= LONGEST else reason[: LONGEST - 1] + "…"
    found = ratio(result.microseconds, name)
    return NOTHING if found is None else f"{found:.3f}"


def _line(row: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
