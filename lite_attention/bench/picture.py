"""Rates against the ceilings, as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lite_attention.bench.results import RowResult, Run
from lite_attention.bench.targets import OURS, OWN_CONTIGUOUS

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {
    OURS: "#0072B2",
    "FA3": "#E69F00",
    "FA4": "#009E73",
    "cuDNN": "#CC79A7",
    "SDPA": "#E69F00",
    OWN_CONTIGUOUS: "#56B4E9",
}
INCHES_PER_BAR = 0.13
INSIDE = 0.1  # of the width: a bar this long has room for its number


def draw(run: Run, path: Path) -> bool:
    """Writes a PNG: a panel of bars in TFLOP/s, one in TB/s. False, and no file, where nothing was timed.

    Rows with skip lists are not in it: theirs is a question of time saved, not of rates.
    """
    timed = [row for row in run.rows if row.times and row.row.skip is None]
    panels = {bound: [row for row in timed if row.row.bound == bound] for bound in ("compute", "memory")}
    panels = {bound: rows for bound, rows in panels.items() if rows}
    if not panels:
        return False
    bars = max(sum(len(row.times) + 1 for row in rows) for rows in panels.values())
    figure = Figure(figsize=(8.5 * len(panels), max(3.5, 1.8 + INCHES_PER_BAR * bars)), layout="constrained")
    for axes, (bound, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _panel(axes, rows, run.ceilings.of(bound), bound)
    place = run.environment["GPU"] if run.device == "cuda" else "the CPU"
    figure.suptitle(f"LiteAttention and its peers on {place}, {run.environment['date'].split()[0]}", fontsize=13)
    figure.savefig(path, dpi=130)
    return True


def _panel(axes: Axes, rows: list[RowResult], ceiling: float, bound: str) -> None:
    """Bars from the top down: a group for each row, a bar for each contender that computed it."""
    at, ticks, drawn = 0.0, [], set()
    right = 1.05 * max(ceiling, *(row.rate(name) for row in rows for name in row.times))
    for row in rows:
        ticks.append(at + (len(row.times) - 1) / 2)
        for name in row.times:
            rate = row.rate(name)
            axes.barh(at, rate, height=0.9, color=COLOURS[name], label=None if name in drawn else name)
            # At the foot of its bar a number is clear of the line of the ceiling; a bar too short for it has it behind.
            foot = 0 if rate > INSIDE * right else rate
            colour = "white" if name == OURS and foot == 0 else "black"
            axes.text(foot, at, f"  {row.rate_text(name)}", va="center", color=colour, fontsize=7)
            drawn.add(name)
            at += 1
        at += 1
    unit, what = rows[0].row.unit, "matrix product" if bound == "compute" else "copy"
    axes.axvline(ceiling, color="black", linestyle="--", linewidth=1, label=f"{what}, {ceiling:.3g} {unit}")
    axes.set_yticks(ticks, [row.row.name for row in rows], fontsize=8)
    axes.set_ylim(at - 0.5, -1)
    axes.set_xlim(0, right)
    axes.set_xlabel(f"{unit}{' of keys and values' if bound == 'memory' else ''}, more is better")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(drawn) + 1, fontsize=8, frameon=False)
