"""The pictures and the table of docs/decode-pages.md, from the results beside this file.

python benchmarks/guide_pictures.py            # draws docs/images/pages-quality.png and pages-speed.png
python benchmarks/guide_pictures.py --table    # prints the table of held-out texts
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/2026-11-27-h200"
IMAGES = ROOT / "docs/images"

KINDS = {"code": "code", "docs": "documentation", "essays": "essays"}  # by how the names of texts begin
# Okabe and Ito's colours, which the colour-blind can tell apart; a setting is told by its mark, hollow where one eps.
COLOURS = {"code": "#0072B2", "docs": "#E69F00", "essays": "#009E73"}
HALF = "0.02, by layer, KL 0.001"
MARKS = {"0.02": "o", "0.1": "s", "0.02, by layer": "^", "0.1, by layer": "D", HALF: "v"}
PANELS = {
    "Qwen2.5-Coder-0.5B, 16k": ("loss-16k",),
    "Qwen2.5-Coder-0.5B, 32k": ("loss-32k",),
    "SmolLM2-135M, 8k; by layer: found with these texts": ("smol", "smol-by-layer-0.02", "smol-by-layer-0.1"),
    "SmolLM2-135M, 8k; by layer: found with other texts": (
        "held-out/0.02-held",
        "held-out/0.1-held",
        "held-out/0.02-kl-0.001-held",
    ),
}
HELD_OUT = {"0.1": ("0.1", "0.1, by layer"), "0.02": ("0.02", "0.02, by layer"), "0.02-kl-0.001": (HALF,)}

STEPS = "a step: pages chosen, then read"
GIVEN = "lists given, nothing chosen"
SERVED = "vLLM, time of a token"
BARS = {STEPS: "#0072B2", GIVEN: "#56B4E9", SERVED: "#009E73"}
ROWS = {
    "step-b64-32k": STEPS,
    "step-b8-128k": STEPS,
    "step-b1-128k": STEPS,
    "short-b64-4k": STEPS,
    "random-20-b64-32k": GIVEN,
    "random-10-b64-32k": GIVEN,
    "random-5-b64-32k": GIVEN,
}
SERVED_BY = {  # by file
    "vllm-code": "Qwen2.5-Coder-0.5B, eps 0.1",
    "vllm-lists": "Llama-8B's shapes",
    "vllm-lists-tp2": "Llama-8B's shapes, two GPUs",
}


@dataclass(frozen=True)
class Point:
    """One text with one setting: bytes read, and the change of perplexity with its standard error, as shares."""

    kind: str
    setting: str
    read: float
    change: float
    error: float


def points(names: Iterable[str]) -> list[Point]:
    """Of the files of losses, what was measured twice only once."""
    found = {}
    for name in names:
        for loss in json.loads((RESULTS / "quality" / f"{name}.json").read_text())["loss"]:
            setting = f"{loss['setting']['eps']:g}"
            if loss["setting"].get("layer_eps"):
                setting = HALF if "kl-0.001" in name else f"{setting}, by layer"
            kind = loss["text"].split(".")[0].split("-")[0]
            point = Point(kind, setting, loss["read"]["bytes"], loss["change"], loss["change_error"])
            found[loss["text"], point] = point
    return list(found.values())


def table() -> str:
    """Held-out texts: of each kind and setting the means over its texts."""
    lines = ["| setting | " + " | ".join(KINDS.values()) + " |", "|---" * (1 + len(KINDS)) + "|"]
    for name, settings in HELD_OUT.items():
        held = points([f"held-out/{name}-held"])
        for setting in settings:
            cells = []
            for kind in KINDS:
                texts = [point for point in held if (point.kind, point.setting) == (kind, setting)]
                read = statistics.mean(point.read for point in texts)
                change = statistics.mean(point.change for point in texts)
                error = math.hypot(*(point.error for point in texts)) / len(texts)
                cells.append(f"{read:.3f}, {100 * change:+.2f}% ± {100 * error:.2f}")
            lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_quality(path: Path) -> None:
    """A panel for each model and context: change of perplexity against bytes read, by text and setting."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2, sharex=True, sharey="row").flat, PANELS.items(), strict=True):
        for point in points(names):
            colour = COLOURS[point.kind]
            axes.errorbar(
                point.read,
                100 * point.change,
                yerr=100 * point.error,
                color=colour,
                marker=MARKS[point.setting],
                markerfacecolor=colour if "layer" in point.setting else "white",
                markersize=5,
                linewidth=0.9,
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlim(0.1, 0.65)
        axes.grid(alpha=0.3)
        axes.set_title(title, fontsize=10)
    for axes in figure.axes:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("change of perplexity in %")
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("bytes read over those of dense attention")
    for kind, name in KINDS.items():
        axes.plot([], [], color=COLOURS[kind], linewidth=4, label=name)
    for setting, mark in MARKS.items():
        face = "black" if "layer" in setting else "white"
        axes.plot([], [], color="black", linestyle="", marker=mark, markerfacecolor=face, label=f"eps {setting}")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def speeds() -> list[tuple[str, str, float]]:
    """What was timed, of which sort, and how many times faster than FLASH_ATTN, or than its kernel alone."""
    found = []
    rows = {row["name"]: row for row in json.loads((RESULTS / "decode/results.json").read_text())["rows"]}
    for name, sort in ROWS.items():
        row = rows[f"pages-{name}"]
        tokens, times = row["shape"]["k_lens"], row["microseconds"]
        read = f"{row['visited']:.0%} of pages" if row["visited"] < 1 else "below min_context"
        label = f"{len(tokens)} x {tokens[0] // 1024}k tokens, {read}"
        found.append((label, sort, times["FA3"]["median"] / times["LiteAttention"]["median"]))
    for name, label in SERVED_BY.items():
        engines = json.loads((RESULTS / f"{name}.json").read_text())
        ours, peer = engines.get("eps=0.1") or engines["LITE_ATTENTION"], engines["FLASH_ATTN"]
        tokens = ours.get("prompt_tokens") or ours["context"]
        label = f"{label}, {ours['requests']} x {tokens} tokens, {ours['pages_read']:.0%} of pages ({ours['commit']})"
        found.append((label, SERVED, peer["ms_per_token"] / ours["ms_per_token"]))
    return found


def draw_speed(path: Path) -> None:
    """Bars from the top down, a group for each sort."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes: Axes = figure.subplots()
    at, ticks, last = 0.0, {}, None
    for label, sort, times in speeds():
        at += 1.6 if last not in (None, sort) else 1
        axes.barh(at, times, height=0.8, color=BARS[sort], label=sort if sort != last else None)
        axes.text(times, at, f" {times:.2f}", va="center", fontsize=8)
        ticks[at], last = label, sort
    axes.axvline(1, color="black", linestyle="--", linewidth=1, label="FLASH_ATTN")
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than FLASH_ATTN (FA3)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table, draw nothing")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures (default: docs/images)")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    draw_quality(arguments.out / "pages-quality.png")
    draw_speed(arguments.out / "pages-speed.png")


if __name__ == "__main__":
    main()
