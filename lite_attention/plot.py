"""Pictures of skip lists, by matplotlib: `pip install 'lite-attention[plot]'`.

The functions return a matplotlib Figure, of which `savefig(path)` makes a file. They wait for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from lite_attention.checks import wrong
from lite_attention.skip import bits
from lite_attention.skip.skip_list import SkipList
from lite_attention.skip.stats import StreamStats

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError as error:
    raise ImportError("lite_attention.plot needs matplotlib: pip install 'lite-attention[plot]'") from error

STATES = {"not seen": "#FFFFFF", "skipped": "#C6DBEF", "visited": "#08519C"}  # by a tile's value in `_states`
COLUMNS = 4
LEGEND_LINES = 8  # of more layers than this a colour bar tells


def draw_list(
    skip_list: SkipList,
    heads: Sequence[int] | None = None,
    *,
    entry: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Figure:
    """The KV tiles that a list visits and skips: queries from the top down, keys from left to right, in tokens.

    Args:
        skip_list: as `LiteAttention.skip_list(stream)` gives it.
        heads: query heads, a panel for each; None is all.
        entry: of the batch.
        causal, window_size: those of the calls: what they hide is drawn as not seen.

    Raises:
        ValueError: a head or an entry that the list doesn't have, or none.
    """
    heads = range(skip_list.num_heads) if heads is None else heads
    if not heads or not all(0 <= head < skip_list.num_heads for head in heads):
        raise wrong("heads", list(heads), f"one or more of 0 to {skip_list.num_heads - 1}")
    if not 0 <= entry < skip_list.batch:
        raise wrong("entry", entry, f"0 to {skip_list.batch - 1}")
    words = skip_list.in_view(window_size[0], 0 if causal else window_size[1])
    in_view = bits.unpack(words, skip_list.kv_tiles).cpu()
    visits = bits.unpack(skip_list.bits[entry], skip_list.kv_tiles).cpu()
    columns = min(COLUMNS, len(heads))
    rows = math.ceil(len(heads) / columns)
    figure = Figure(figsize=(1 + 3.2 * columns, 1 + 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, head in zip(panels, heads, strict=False):
        _draw_head(axes, visits[head], in_view, skip_list)
        axes.set_title(f"head {head}: {_skipped(visits[head], in_view):.0%} skipped", fontsize=10)
    for axes in panels[len(heads) :]:
        axes.set_visible(False)
    figure.supxlabel("key token")
    figure.supylabel("query token")
    patches = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in STATES.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False)
    return figure


def draw_sparsity(stats: Mapping[str, Mapping[str, StreamStats]]) -> Figure:
    """Sparsity over steps, the mean over heads: a line for each layer, a panel for each stream.

    Args:
        stats: of `collect_stats`, with calls that were recorded (`LiteAttention(stats_steps=...)`).

    Raises:
        ValueError: nothing was recorded.
    """
    recorded = {layer: {name: x for name, x in streams.items() if x.steps} for layer, streams in stats.items()}
    streams = list(dict.fromkeys(name for of_layer in recorded.values() for name in of_layer))
    if not streams:
        raise wrong("stats", "no recorded call", "modules with stats_steps of 1 or more, that were called")
    layers = [layer for layer, of_layer in recorded.items() if of_layer]
    colours = colormaps["viridis"].resampled(len(layers))
    figure = Figure(figsize=(1.5 + 4.5 * len(streams), 4), layout="constrained")
    panels = figure.subplots(1, len(streams), squeeze=False, sharey=True)[0]
    for axes, stream in zip(panels, streams, strict=True):
        for number, layer in enumerate(layers):
            if stream in recorded[layer]:
                _draw_steps(axes, recorded[layer][stream], colours(number), layer)
        axes.set_title(f"stream {stream}", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("part of the tiles that was skipped")
    if len(layers) <= LEGEND_LINES:
        handles = {line.get_label(): line for axes in panels for line in axes.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    else:
        bar = figure.colorbar(ScalarMappable(Normalize(0, len(layers) - 1), colours), ax=panels)
        bar.set_label(f"layer, from {layers[0]} to {layers[-1]}")
    return figure


def _draw_head(axes: Axes, visits: torch.Tensor, in_view: torch.Tensor, skip_list: SkipList) -> None:
    states = torch.where(in_view, 1 + visits.int(), 0)
    q_tiles, kv_tiles = states.shape
    axes.imshow(
        states.numpy(),
        cmap=ListedColormap(list(STATES.values())),
        vmin=0,
        vmax=len(STATES) - 1,
        interpolation="nearest",
        aspect="auto",
        extent=(0, kv_tiles * skip_list.block_n, q_tiles * skip_list.block_m, 0),
    )
    axes.set(xlim=(0, skip_list.max_seqlen_k), ylim=(skip_list.max_seqlen_q, 0))  # without what the last tiles lack


def _skipped(visits: torch.Tensor, in_view: torch.Tensor) -> float:
    return 1 - (visits & in_view).sum().item() / max(1, in_view.sum().item())


def _draw_steps(axes: Axes, stats: StreamStats, colour: tuple[float, ...], label: str) -> None:
    """A line that breaks where a new sequence starts."""
    steps, means = [], []
    for step, mean in zip(stats.steps, stats.sparsity.mean(1).tolist(), strict=True):
        if steps and step <= steps[-1]:
            steps.append(steps[-1])
            means.append(math.nan)
        steps.append(step)
        means.append(mean)
    axes.plot(steps, means, color=colour, label=label, marker=".", linewidth=1)
