"""The results as tables: cells, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from lite_attention.quality.budgets import Rung
from lite_attention.quality.calibrate import Calibration
from lite_attention.quality.results import Run

SHOWN = 8  # side-by-sides; the JSON has all
Table = tuple[str, list[str], list[list[str]]]
"""Caption, header, rows."""


def tables(run: Run) -> list[Table]:
    """A table for each measurement that was made."""
    found: list[Table] = []
    if run.calibration:
        found.append((CALIBRATION, CALIBRATION_HEADER, _calibration(run.calibration)))
        found.append((TOGETHER, TOGETHER_HEADER, _together(run.calibration)))
    if run.loss:
        found.append((LOSS, LOSS_HEADER, _loss(run)))
    if run.retrieval:
        found.append((RETRIEVAL, ["needle", "context", "lists", "found", "lost"], _retrieval(run)))
    if run.generation:
        found.append((GENERATION, ["lists", "same", "agreed, median", "agreed, mean", "shortest"], _generation(run)))
    return found


CALIBRATION = (
    "An eps for each layer. KL is what lists in this layer alone cost, with the target as its eps and with its own, in "
    "nats a token beyond rounding, of the text where it is most, with its standard error. Read is bytes over those of "
    "dense attention, and left out true softmax mass, with its own."
)
CALIBRATION_HEADER = ["layer", "eps", "KL at the target", "KL", "read", "left out"]
TOGETHER = (
    "Lists in all layers together, with the target as eps and with each layer's own. KL has what rounding alone makes, "
    "which lists of everything show; the sum is of the layers alone, without it."
)
TOGETHER_HEADER = ["text", "read at the target", "KL at the target", "read", "KL", "sum", "budget", "rounding"]
LOSS = (
    "Loss of teacher-forced steps; the change has its standard error. Read is bytes of listed pages and sketches over "
    "those of all pages. Left out is softmax mass, as the lists estimate it and truly; over eps is the share of steps "
    "and heads that truly miss more. By layer: layers have an eps of their own."
)
LOSS_HEADER = [
    "text",
    "context",
    "lists",
    "read",
    "perplexity",
    "change",
    "KL",
    "same token",
    "left out, estimate",
    "left out",
    "over eps",
]
RETRIEVAL = "Retrieval: lost is how many are found by dense attention and not with lists."
GENERATION = (
    "Greedy generation: tokens until the first difference from dense attention; eps 0 lists everything, so that only "
    "rounding differs."
)


def calibration_remarks(calibration: Calibration) -> tuple[list[str], dict[int, str]]:
    """Comments of the file, at its head and of each layer."""
    head = [
        f"KL: divergence of next-token distributions from those of dense attention, nats a token; budget "
        f"{calibration.budget:.4g}.",
        "Of a layer: with lists in it alone, in the text where it is most. Read: bytes over those of dense attention.",
    ]
    head += [
        f"All layers together, {one.text!r}: KL {one.divergence:.4f} ± {one.error:.4f}, of which rounding "
        f"{one.rounding:.4f}; read {one.read:.3f}."
        for one in calibration.together
    ]
    layers = {}
    for layer, rung in calibration.chosen.items():
        layers[layer] = f"KL {_most(rung)}, read {rung.read:.3f}"
        if rung != calibration.at_target[layer]:
            layers[layer] += f"; at the target KL {_most(calibration.at_target[layer])}"
    return head, layers


def _most(rung: Rung) -> str:
    divergence, error = rung.most
    return f"{divergence:.5f} ± {error:.5f}" if rung.eps else "0"


def _calibration(calibration: Calibration) -> list[list[str]]:
    return [
        [
            str(layer),
            f"{rung.eps:.4g}",
            _most(calibration.at_target[layer]),
            _most(rung),
            f"{rung.read:.3f}",
            f"{rung.left_out:.4f}",
        ]
        for layer, rung in calibration.chosen.items()
    ]


def _together(calibration: Calibration) -> list[list[str]]:
    return [
        [
            one.text,
            f"{one.read_at_target:.3f}",
            f"{one.at_target:.4f}",
            f"{one.read:.3f}",
            f"{one.divergence:.4f} ± {one.error:.4f}",
            f"{one.alone:.4f}",
            f"{calibration.budget:.4g}",
            f"{one.rounding:.4f}",
        ]
        for one in calibration.together
    ]


def _loss(run: Run) -> list[list[str]]:
    return [
        [
            one.text,
            str(one.context),
            str(one.setting),
            f"{one.read.bytes:.3f}",
            f"{one.perplexity:.4f}",
            f"{one.change:+.2%} ± {100 * one.change_error:.2f}",
            f"{one.divergence:.4f}",
            f"{one.same_first:.1%}",
            f"{one.read.left_out_estimate:.4f}",
            f"{one.read.left_out:.4f}",
            f"{one.read.over_budget:.1%}",
        ]
        for one in run.loss
    ]


def _retrieval(run: Run) -> list[list[str]]:
    return [
        [one.kind, str(one.context), str(one.setting), f"{one.found} of {one.cases}", str(one.lost)]
        for one in run.retrieval
    ]


def _generation(run: Run) -> list[list[str]]:
    return [
        [
            str(one.setting),
            f"{one.same} of {len(one.agreed)}",
            f"{median(one.agreed):g} of {one.tokens}",
            f"{sum(one.agreed) / len(one.agreed):.1f}",
            str(min(one.agreed)),
        ]
        for one in run.generation
    ]


def markdown(run: Run, picture: str | None) -> str:
    """The whole report. `picture` is the file beside it; None where there is no loss to draw."""
    lines = [
        f"# Quality of decoding from listed pages: {run.model['model']}",
        "",
        "Written by `python -m lite_attention.quality`; [results.json](results.json) has everything.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in run.facts.items()),
        "",
        *([f"![Loss against bytes read]({picture})", ""] if picture else []),
    ]
    for caption, header, rows in tables(run):
        lines += [caption, "", _row(header), "|" + "---|" * len(header), *map(_row, rows), ""]
    differences = [(one.setting, each) for one in run.generation for each in one.differences]
    if differences:
        lines += [
            "First differences, of dense attention and of lists:",
            "",
            _row(["lists", "prompt", "after", "both", "dense", "lists say"]),
            "|" + "---|" * 6,
        ]
        lines += [
            _row([str(setting), f"{each.prompt} ({each.prompt_tokens} tokens)", str(each.at), *map(repr, _sides(each))])
            for setting, each in differences[:SHOWN]
        ]
    return "\n".join(lines).rstrip() + "\n"


def _sides(difference: object) -> tuple[str, str, str]:
    return difference.both, difference.dense, difference.listed


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
