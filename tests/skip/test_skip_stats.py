"""Sparsity against counts from the lists, one tile at a time; which tiles are in view; pictures of both."""

from __future__ import annotations

import sys

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steps import TILE, coherent, fresh, module
from torch import nn

from lite_attention import SkipList, collect_stats, lite_modules, skip_attention
from lite_attention.skip import bits


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1))
def test_bits_are_counted(words):
    assert bits.count(torch.tensor(words, dtype=torch.int32)).tolist() == [(x % 2**32).bit_count() for x in words]


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.data())
def test_tiles_in_view_are_those_that_a_row_sees(n, m, block_m, block_n, data):
    causal = data.draw(st.booleans())
    window = (data.draw(st.integers(-1, 45)), data.draw(st.integers(-1, 45)))
    skip_list = SkipList.fresh(1, 1, n, m, tile=(block_m, block_n))
    seen = torch.zeros(skip_list.q_tiles, skip_list.kv_tiles, dtype=torch.bool)
    for i in range(n):
        for j in range(m):
            if oracle.sees(i, j, n, m, causal, window):
                seen[i // block_m, j // block_n] = True
    in_view = skip_list.in_view(window[0], 0 if causal else window[1])
    assert torch.equal(bits.unpack(in_view, skip_list.kv_tiles), seen)


@pytest.mark.parametrize("causal", [False, True])
def test_sparsity_is_the_part_left_out_of_the_tiles_in_view(causal):
    calls, do, skip = list(coherent(5)), [(0, 3)], [(16, 40)]
    attention, skip_list = module(stats_steps=3, causal=causal), fresh(*calls[0][:2])
    in_view = bits.unpack(skip_list.in_view(-1, 0 if causal else -1), skip_list.kv_tiles)

    def left_out(visits):
        kept = (visits & in_view).sum((0, 2, 3))
        return 1 - kept.float() / (in_view.sum() * visits.shape[0])

    expected = []
    for step, call in enumerate(calls):
        forced = {"must_do": do, "must_skip": skip} if step % 2 else {}
        visits = skip_list.visits()
        if forced:
            visits[..., 2:5] = False
            visits[..., 0] = True
        expected.append(left_out(visits))
        skip_attention(*call, skip_list, -3.0, causal=causal, **forced)
        attention(*call, **{f"{name}_list": x for name, x in forced.items()})
    stats = attention.stats()["default"]
    assert stats.steps == (2, 3, 4)
    assert torch.allclose(stats.sparsity, torch.stack(expected[2:]))
    assert torch.allclose(stats.now, left_out(skip_list.visits()))
    assert stats.mean == pytest.approx(torch.stack(expected[2:]).mean().item())
    assert len(set(stats.now.tolist())) > 1  # heads differ


def test_steps_count_within_a_sequence():
    attention = module(num_steps=4, stats_steps=6)
    assert attention.stats() == {}
    for call in coherent(7):
        attention(*call)
    stats = attention.stats()["default"]
    assert stats.steps == (1, 2, 3, 0, 1, 2)
    assert (stats.sparsity.mean(1) == 0).tolist() == [False, False, False, True, False, False]
    attention.reset_skip_state()
    assert attention.stats()["default"].steps == () and attention.stats()["default"].sparsity.shape == (0, 4)
    for call in coherent(2):
        attention(*call)
    assert attention.stats()["default"].steps == (0, 1)


def test_nothing_is_recorded_unless_asked():
    attention = module()
    for call in coherent(3):
        attention(*call)
    stats = attention.stats()["default"]
    assert stats.steps == () and stats.sparsity.shape == (0, 4) and (stats.now > 0).all()


def test_without_tiles_nothing_is_left_out():
    attention = module(stats_steps=2)
    for shape in ((0, 5, 4, 16), (2, 0, 4, 16)):
        attention(torch.zeros(shape), torch.zeros(shape[0], 9, 4, 16), torch.zeros(shape[0], 9, 4, 16))
        assert attention.stats()["default"].sparsity.tolist() == [[0.0] * 4]
    attention(torch.zeros(2, 5, 4, 16), torch.zeros(2, 0, 4, 16), torch.zeros(2, 0, 4, 16))
    assert attention.stats()["default"].sparsity.tolist() == [[0.0] * 4]


class Model(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.layers = nn.ModuleList(module(name=name, stats_steps=4) for name in names)

    def forward(self, q, k, v, stream):
        for layer in self.layers:
            q = layer(q, k, v, stream=stream)
        return q


def test_stats_of_a_model_are_by_layer_and_stream():
    model = Model(None, "middle", None)
    assert list(lite_modules(model)) == ["layers.0", "middle", "layers.2"]
    for call in coherent(3):
        for stream in ("cond", "uncond"):
            model(*call, stream)
    stats = collect_stats(model)
    assert list(stats) == list(lite_modules(model))
    assert all(list(streams) == ["cond", "uncond"] for streams in stats.values())
    own = model.layers[1].stats()["uncond"].sparsity
    assert torch.equal(stats["middle"]["uncond"].sparsity, own)
    assert lite_modules(model.layers[0]) == {"": model.layers[0]}


def test_layers_need_names_of_their_own():
    with pytest.raises(ValueError, match="model: got two LiteAttention modules with name='same'; needs a name"):
        collect_stats(Model("same", "same"))


def test_a_list_is_drawn_tile_by_tile():
    plot = pytest.importorskip("lite_attention.plot")
    visits = torch.zeros(2, 5, 5, 12, dtype=torch.bool)
    visits[1, 3, 4, :6], visits[1, 3, 0, 0] = True, True
    skip_list = SkipList.from_visits(visits, TILE, 40, 90)
    figure = plot.draw_list(skip_list, [3, 0], entry=1, causal=True)
    first, second = figure.axes
    image = first.images[0].get_array()
    hidden = list(plot.STATES).index("not seen")
    in_view = bits.unpack(skip_list.in_view(-1, 0), 12)
    assert (image == hidden).tolist() == (~in_view).tolist()
    assert (image == list(plot.STATES).index("visited")).tolist() == (visits[1, 3] & in_view).tolist()
    skipped = 1 - 7 / in_view.sum().item()
    assert first.get_title() == f"head 3: {skipped:.0%} skipped" and second.get_title() == "head 0: 100% skipped"
    assert first.images[0].get_extent() == [0, 12 * 8, 5 * 8, 0]
    assert first.get_xlim() == (0, 90) and first.get_ylim() == (40, 0)
    assert [axes.get_visible() for axes in plot.draw_list(skip_list).axes] == [True] * 5 + [False] * 3


@pytest.mark.parametrize("layers", [2, 9])
def test_sparsity_is_drawn_by_layer_and_stream(layers, tmp_path):
    plot = pytest.importorskip("lite_attention.plot")
    model = Model(*[None] * layers)
    for call in coherent(3):
        model(*call, "cond")
    stats = collect_stats(model)
    figure = plot.draw_sparsity(stats)
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == list(stats)
    for line, streams in zip(lines, stats.values(), strict=True):
        assert list(line.get_xdata()) == [0, 1, 2]
        assert list(line.get_ydata()) == streams["cond"].sparsity.mean(1).tolist()
    figure.savefig(tmp_path / "sparsity.png")
    assert (len(figure.axes) == 2) == (layers == 9)  # a colour bar in place of a legend


def test_a_line_breaks_where_a_sequence_starts():
    plot = pytest.importorskip("lite_attention.plot")
    attention = module(num_steps=2, stats_steps=4)
    for call in coherent(4):
        attention(*call)
    (line,) = plot.draw_sparsity({"layer": attention.stats()}).axes[0].get_lines()
    assert list(line.get_xdata()) == [0, 1, 1, 0, 1]
    assert [y != y for y in line.get_ydata()] == [False, False, True, False, False]


def test_what_pictures_refuse():
    plot = pytest.importorskip("lite_attention.plot")
    attention = module()
    attention(*next(coherent(1)))
    for heads in ([], [4], [-1]):
        with pytest.raises(ValueError, match=r"heads: got .*; needs one or more of 0 to 3"):
            plot.draw_list(attention.skip_list(), heads)
    with pytest.raises(ValueError, match="entry: got 2; needs 0 to 1"):
        plot.draw_list(attention.skip_list(), entry=2)
    with pytest.raises(ValueError, match="stats: got no recorded call; needs modules with stats_steps of 1 or more"):
        plot.draw_sparsity({"layer": attention.stats()})


def test_without_matplotlib_pictures_say_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name == "lite_attention.plot"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'lite-attention\[plot\]'"):
        import lite_attention.plot  # noqa: F401
