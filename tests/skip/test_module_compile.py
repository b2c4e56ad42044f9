"""`LiteAttention` under `torch.compile`: whole graphs, the state in place, and how often it compiles."""

from __future__ import annotations

import shutil

import pytest
import torch
from steps import assert_same, coherent, functional, module
from torch import nn

from lite_attention import collect_stats

BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++")),
]


@pytest.fixture(autouse=True)
def start_anew():
    """PyTorch counts the graphs of a function, and has a limit."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Compiled:
    """A module whose calls are compiled."""

    def __init__(self, attention, backend):
        self.attention, self.calls = attention, torch.compile(attention, fullgraph=True, backend=backend)

    def __call__(self, *args, **kwargs):
        return self.calls(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.attention, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inference", [False, True])
def test_compiled_calls_are_the_eager_ones(backend, inference):
    calls = list(coherent(7))
    options = {"num_steps": 5, "refresh_every": 3, "stats_steps": 8}
    compiled, eager = Compiled(module(**options), backend), module(**options)
    with torch.inference_mode(inference):
        assert_same(compiled, calls, functional(calls, refresh=(3, 5)))
        for call in calls:
            eager(*call)
        assert torch.equal(compiled.stats()["default"].sparsity, eager.stats()["default"].sparsity)
    assert graphs() == 2  # one that makes the state, one that has it


def test_between_compiled_calls_the_state_changes_without_compiling_again():
    first, second, third = coherent(3)
    compiled, eager = Compiled(module(), "aot_eager"), module()
    for attention in (compiled, eager):
        attention(*first)
        attention(*second)
    before = graphs()
    for change in (
        lambda x: x.set_threshold(-1.0),
        lambda x: x.set_threshold([-1.0, -2.0, -3.0, -0.5]),
        lambda x: x.reorder_batch(torch.tensor([1, 0])),
        lambda x: x.reset_skip_state(),
    ):
        for attention in (compiled, eager):
            change(attention)
        assert torch.equal(compiled(*third), eager(*third))
        assert torch.equal(compiled.skip_list().bits, eager.skip_list().bits)
    assert graphs() == before


def test_disabling_and_forced_tiles_compile():
    calls = list(coherent(4))
    compiled, eager = Compiled(module(), "aot_eager"), module()
    for enabled in (True, False, True):
        for attention in (compiled, eager):
            attention.enable_skip_optimization(enabled)
        for call in calls[:2]:
            for forced in ({}, {"must_do_list": [(0, 4)], "must_skip_list": [[(8, 40)], []]}):
                assert torch.equal(compiled(*call, **forced), eager(*call, **forced))
                assert torch.equal(compiled.skip_list().bits, eager.skip_list().bits)


def test_streams_and_shapes_compile():
    compiled = Compiled(module(), "aot_eager")
    for options in ({}, {"seqlen_k": 70}):
        for stream in ("cond", "uncond"):
            calls = list(coherent(3, **options))
            assert_same(compiled, calls, functional(calls), stream=stream)


def test_layers_of_one_compiled_block_have_lists_of_their_own():
    """Blocks of one class share compiled code; the lists are its inputs."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module(stats_steps=4)

        def forward(self, q, k, v):
            return q + self.attention(q, k, v)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, q, k, v):
            for block in self.blocks:
                q = block(q, k, v)
            return q

    compiled, eager = Model(), Model()
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for call in coherent(4):
        assert torch.equal(compiled(*call), eager(*call))
    of_layers = [collect_stats(model) for model in (compiled, eager)]
    assert list(of_layers[1]) == [f"blocks.{n}.attention" for n in range(3)]
    for got, expected in zip(*[stats.values() for stats in of_layers], strict=True):
        assert torch.equal(got["default"].sparsity, expected["default"].sparsity)
    assert graphs() == 2
