"""Loss against bytes read, as a picture: where to put eps."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lite_attention.quality.loss import Loss
from lite_attention.quality.results import Run

# Okabe and Ito's colours, which the colour-blind can tell apart, and marks for those who see none.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKS = "osD^vP"


def draw(run: Run, path: Path) -> bool:
    """Writes a PNG: a line for each text and context, and one for settings by layer.

    False, and no file, where no loss was measured.
    """
    if not run.loss:
        return False
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, int, str], list[Loss]] = {}
    for one in run.loss:
        how = ", by layer" if one.setting.layer_eps else ""
        lines.setdefault((one.text, one.context, how), []).append(one)
    for n, ((text, context, how), found) in enumerate(lines.items()):
        found.sort(key=lambda one: one.read.bytes)
        points = [(one.read.bytes, 100 * one.change) for one in found]
        colour, mark = COLOURS[n % len(COLOURS)], MARKS[n % len(MARKS)]
        axes.plot(*zip(*points, strict=True), color=colour, marker=mark, label=f"{text}, {context} tokens{how}")
        for one, point in zip(found, points, strict=True):
            axes.annotate(f"{one.setting.eps:g}", point, (4, 5), textcoords="offset points", fontsize=7)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(0, 1.05)
    axes.set_xlabel("bytes read over those of dense attention, less is better; the numbers are eps")
    axes.set_ylabel("change of perplexity in %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"{run.model['model']}: decoding from listed pages", fontsize=11)
    figure.savefig(path, dpi=130)
    return True
