"""`SeqParallelLiteAttention` on ranks that are processes, beside what one process computes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import assert_close
from ranks import part, run_ranks
from steps import THRESHOLD, TILE, coherent, functional, module
from torch import nn

from lite_attention import (
    SeqParallelLiteAttention,
    SkipList,
    collect_stats,
    flash_attn_func,
    merge_attention,
    skip_attention,
)

STEPS = 4
SIZES = {"seqlen_q": 48, "seqlen_k": 96, "heads": 8, "heads_k": 4}
SQUARE = SIZES | {"seqlen_q": 96}
FORCED = {"must_do_list": [[(0, 3)], [(50, 70)]], "must_skip_list": [(8, 52)]}
TENSORS = {
    "must_do_list": torch.tensor([[[0, 3]], [[50, 70]]], dtype=torch.int32),
    "must_skip_list": torch.tensor([[[8, 52]]] * 2, dtype=torch.int32),
}
MUST = {name.removesuffix("_list"): ranges for name, ranges in FORCED.items()}

BY_STEP = torch.linspace(-6, -1, STEPS)[:, None] - torch.linspace(0, 1, SIZES["heads"])


def parallel(method, **options):
    return SeqParallelLiteAttention(method, **({"threshold": THRESHOLD, "tile": TILE} | options))


def run_calls(attention, calls, rank, size, **call_options):
    """(out, lse, the list's bits of each part that has one) of each call."""
    results = []
    for call in calls:
        out, lse = attention(*(part(x, rank, size) for x in call), return_softmax_lse=True, **call_options)
        lists = [one.skip_list("default").bits.clone() if one.streams else None for one in attention.parts]
        results.append((out, lse, lists))
    return results


def both_methods(rank, size):
    """What every test of results needs, of one start of the processes."""
    sizes, square = list(coherent(STEPS, **SIZES)), list(coherent(STEPS, **SQUARE))
    heads = torch.linspace(-6, -1, SIZES["heads"])
    results = {}
    for method in ("ring", "ulysses"):
        for name, calls, options, forced in (
            ("dense", sizes, {"threshold": -math.inf}, {}),
            ("dense causal", square, {"threshold": -math.inf, "causal": True}, {}),
            ("dense bfloat16", [tuple(x.bfloat16() for x in call) for call in sizes], {"threshold": -math.inf}, {}),
            ("skipping", sizes, {"num_steps": 3}, {}),
            ("skipping causal", square, {"causal": True}, {}),
            ("forced", sizes, {}, FORCED),
            ("forced by tensors", sizes, {}, TENSORS),
            ("a threshold a head", sizes, {"threshold": heads}, {}),
            ("a threshold a step", sizes, {"threshold": BY_STEP, "num_steps": STEPS}, {}),
        ):
            results[method, name] = run_calls(parallel(method, **options), calls, rank, size, **forced)
    window = parallel("ulysses", window_size=(60, 50))
    results["ulysses", "window"] = run_calls(window, square, rank, size)
    return results


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    return run_ranks(both_methods, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("name", ["dense", "dense causal", "dense bfloat16"])
def test_without_skipping_it_is_dense_attention(ranks, method, name):
    calls = list(coherent(STEPS, **(SQUARE if "causal" in name else SIZES)))
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    for step, call in enumerate(calls):
        q, k, v = (x.to(dtype).float() for x in call)
        out, lse = flash_attn_func(q, k, v, causal="causal" in name, return_softmax_lse=True)
        for rank, results in enumerate(ranks):
            got, got_lse, _ = results[method, name][step]
            epsilon = max(2 * torch.finfo(dtype).eps, 1e-5)  # the parts' outputs are rounded before they are merged
            assert got.dtype == dtype and got_lse.dtype == torch.float32
            assert_close(got.float(), part(out, rank, len(ranks)), rtol=epsilon, atol=epsilon)
            # The fused kernel of the CPU path sums bfloat16's exponentials a little less exactly.
            lse_epsilon = 1e-5 if dtype == torch.float32 else 1e-4
            assert_close(got_lse, part(lse, rank, len(ranks), dim=2), rtol=1e-6, atol=lse_epsilon)


RING = {
    "skipping": ({}, (3,), {}),
    "skipping causal": ({"causal": True}, (), {}),
    "forced": ({}, (), MUST),
    "forced by tensors": ({}, (), MUST),
    "a threshold a head": ({"threshold": torch.linspace(-6, -1, SIZES["heads"])}, (), {}),
    "a threshold a step": ({"threshold": BY_STEP}, (), {}),
}


def own_ranges(ranges, key_part, tokens):
    """Of a part of the keys, by the tokens in them."""
    inside = [x - key_part * tokens for begin, end in ranges for x in range(begin, end)]
    return [(x, x + 1) for x in inside if 0 <= x < tokens]


@pytest.mark.parametrize("name", RING)
def test_in_the_ring_each_part_of_the_keys_has_a_list(ranks, name):
    """Of each rank's queries and each part alone, as one process computes it; outputs are over what was visited."""
    options, refresh, must = RING[name]
    causal, threshold = options.get("causal", False), options.get("threshold", THRESHOLD)
    size, calls = len(ranks), list(coherent(STEPS, **(SQUARE if causal else SIZES)))
    tokens = SIZES["seqlen_k"] // size
    for rank, results in enumerate(ranks):
        of_parts = {}
        for key_part in range(rank + 1 if causal else size):
            own = {
                which: [own_ranges(entry, key_part, tokens) for entry in (x if isinstance(x[0], list) else [x] * 2)]
                for which, x in must.items()
            }
            of_part = [
                (part(q, rank, size), part(k, key_part, size).contiguous(), part(v, key_part, size).contiguous())
                for q, k, v in calls
            ]
            diagonal = causal and key_part == rank
            of_parts[key_part] = functional(of_part, threshold, refresh, causal=diagonal, **own)
        for step in range(STEPS):
            out, lse, lists = results["ring", name][step]
            for key_part in range(size):
                if key_part in of_parts:
                    assert torch.equal(lists[key_part], of_parts[key_part][step][2])
                else:
                    assert lists[key_part] is None
            outs, lses = (torch.stack([x[step][n].double() for x in of_parts.values()]) for n in (0, 1))
            weights = torch.softmax(lses, dim=0).transpose(2, 3)[..., None]
            assert_close(out.double(), (weights * outs).sum(0), rtol=1e-5, atol=1e-6)
            assert_close(lse.double(), lses.logsumexp(0), rtol=1e-6, atol=1e-5)
    rows = calls[0][0].shape[1] // size
    visits = [SkipList(x, *TILE, rows, tokens).visits() for x in lists if x is not None]
    assert min(x.float().mean() for x in visits) < 0.9


ULYSSES = {
    "skipping": ({}, (3,), {}),
    "skipping causal": ({"causal": True}, (), {}),
    "forced": ({}, (), MUST),
    "forced by tensors": ({}, (), MUST),
    "a threshold a head": ({"threshold": torch.linspace(-6, -1, SIZES["heads"])}, (), {}),
    "a threshold a step": ({"threshold": BY_STEP}, (), {}),
    "window": ({"window_size": (60, 50)}, (), {}),
}


@pytest.mark.parametrize("name", ULYSSES)
def test_ulysses_is_one_process_by_heads(ranks, name):
    options, refresh, must = ULYSSES[name]
    square = "causal" in name or name == "window"
    calls = list(coherent(STEPS, **(SQUARE if square else SIZES)))
    expected = functional(calls, refresh=refresh, **({"threshold": THRESHOLD} | options), **must)
    for step, (out, lse, bits) in enumerate(expected):
        for rank, results in enumerate(ranks):
            got, got_lse, (own,) = results["ulysses", name][step]
            assert torch.equal(own, part(bits, rank, len(ranks)))
            assert_close(got, part(out, rank, len(ranks)), rtol=1e-6, atol=1e-7)
            assert_close(got_lse, part(lse, rank, len(ranks), dim=2), rtol=1e-6, atol=1e-6)


def methods_of_the_module(rank, size):
    """A model of two layers: what its methods do to the lists of this rank, and how it goes on."""
    calls = list(coherent(STEPS, **SIZES))
    found = {}
    for method in ("ring", "ulysses"):
        options = {"save_state": True, "stats_steps": STEPS}
        model = nn.ModuleDict({"first": parallel(method, **options), "second": parallel(method, name="own", **options)})
        twin = nn.ModuleDict({"first": parallel(method, **options), "second": parallel(method, name="own", **options)})
        attention = model["first"]
        for stream in ("cond", "uncond"):
            for layer in model.values():
                run = [layer(*(part(x, rank, size) for x in call), stream=stream) for call in calls[:2]]
        last = [part(x, rank, size) for x in calls[2]]
        found[method, "stats"] = {name: list(streams) for name, streams in collect_stats(model).items()}
        found[method, "own stats"] = [
            torch.equal(a["cond"].sparsity, b["cond"].sparsity)
            for a, b in zip(attention.stats(), [one.stats() for one in attention.parts], strict=True)
        ]
        twin.load_state_dict(model.state_dict())
        same = (
            [model[name](*last, stream="cond") for name in model],
            [twin[name](*last, stream="cond") for name in twin],
        )
        found[method, "loaded"] = [torch.equal(x, y) for x, y in zip(*same, strict=True)]

        copied = copy.deepcopy(attention)
        found[method, "copied"] = torch.equal(copied(*last, stream="uncond"), attention(*last, stream="uncond"))
        copied.reset_skip_state()

        def full(stream, attention=attention):
            return [bool(one.skip_list(stream).visits().all()) for one in attention.parts]

        found[method, "before"] = full("cond"), full("uncond")
        attention.reset_skip_state("cond")
        found[method, "after a reset"] = full("cond"), full("uncond")
        attention.enable_skip_optimization(False)
        found[method, "disabled"] = attention(*last, stream="uncond")
        attention.enable_skip_optimization()
        attention.set_threshold(-math.inf)
        attention.reset_skip_state()
        found[method, "enabled"] = attention(*last, stream="uncond")
        attention.drop_skip_state()
        found[method, "dropped"] = [one.streams for one in attention.parts]
        found[method, "repr"] = repr(attention).splitlines()[1].strip()
        assert len(run) == 2
    return found


def test_methods_are_those_of_the_parts(tmp_path):
    size = 2
    q, k, v = list(coherent(STEPS, **SIZES))[2]
    dense = flash_attn_func(q, k, v)
    for rank, found in enumerate(run_ranks(methods_of_the_module, size, tmp_path)):
        for method, parts in (("ring", 2), ("ulysses", 1)):
            layers = [f"first.parts.{n}" for n in range(parts)] + [f"own.parts.{n}" for n in range(parts)]
            assert found[method, "stats"] == {layer: ["cond", "uncond"] for layer in layers}
            assert found[method, "own stats"] == [True] * parts
            assert found[method, "loaded"] == [True, True]
            assert found[method, "copied"]
            assert not all(found[method, "before"][0]) and not all(found[method, "before"][1])
            assert all(found[method, "after a reset"][0]) and not all(found[method, "after a reset"][1])
            for calls in ("disabled", "enabled"):
                assert_close(found[method, calls], part(dense, rank, size), rtol=1e-5, atol=1e-6)
            assert found[method, "dropped"] == [()] * parts
            assert found[method, "repr"] == f"method='{method}', rank={rank} of 2"


def refusals(rank, size):
    """What each call says, on every rank; after it the ranks still agree on the next exchange."""
    q, k, v = (part(x, rank, size) for x in next(coherent(1, **SIZES)))
    found = {}

    def note(name, call):
        try:
            call()
        except (ValueError, NotImplementedError) as error:
            found[name] = str(error)

    ring, ulysses = parallel("ring"), parallel("ulysses")
    note("method", lambda: parallel("rings"))
    note("window", lambda: parallel("ring", window_size=(5, -1)))
    note("q heads", lambda: ulysses(q[:, :, :3], k[:, :, :1], v[:, :, :1]))
    note("k heads", lambda: ulysses(q, k[:, :, :1], v[:, :, :1]))
    note("causal", lambda: parallel("ring", causal=True)(q, k, v))
    note("mask", lambda: ring(q, k, v, must_do_list=torch.zeros(2, 1, dtype=torch.int32)))
    note("range", lambda: ring(q, k, v, must_skip_list=[(0, 97)]))
    note("uneven k", lambda: parallel("ring")(q, k[:, rank:], v[:, rank:]))
    note("uneven q", lambda: ulysses(q[:, rank:], k, v))
    note("threshold", lambda: ulysses.set_threshold([-1.0, -2.0, -3.0]))
    note("backend", lambda: parallel("ring", backend="hopper")(q, k, v))
    note("v", lambda: ring(q, k, v[:, 1:]))
    found["uneven q in the ring"] = ring(q[:, rank:], k, v)
    return found


def test_what_it_refuses(tmp_path):
    q, k, v = next(coherent(1, **SIZES))
    dense = flash_attn_func(q, k, v)
    for rank, found in enumerate(run_ranks(refusals, 2, tmp_path)):
        own = found.pop("uneven q in the ring")
        assert_close(own, part(dense, rank, 2)[:, rank:], rtol=1e-5, atol=1e-6)
        assert found == {
            "method": "method: got 'rings'; needs 'ring' or 'ulysses'",
            "window": "window_size: got (5, -1); method='ring' has only (-1, -1), and method='ulysses' any",
            "q heads": "q: got 3 heads; needs a number that the 2 ranks divide; method='ring' has any",
            "k heads": "k: got 1 heads; needs a number that the 2 ranks divide; method='ring' has any",
            "causal": "q: got 24 tokens; needs as many as k, 48, where the ring is causal",
            "mask": "must_do: got a mask of tiles; "
            "needs token ranges, as the tiles of each rank start at its first token",
            "range": "must_skip: got (0, 97); needs 0 <= begin <= end <= 96, the keys of the list",
            "uneven k": "k: got the sizes [(2, 48, 4, 16), (2, 47, 4, 16)] on ranks 0 to 1; "
            "needs the same sizes on all ranks",
            "uneven q": "q and k: got the sizes [(2, 24, 8, 16, 2, 48, 4, 16), (2, 23, 8, 16, 2, 48, 4, 16)] "
            "on ranks 0 to 1; needs the same sizes on all ranks",
            "threshold": "threshold: got 3 values; needs one for each head, of which 2 ranks have as many",
            "backend": "backend: got 'hopper' for tensors on cpu; needs tensors on a Hopper GPU, or another backend",
            "v": "v: got shape (2, 47, 4, 16); needs the shape of k, (2, 48, 4, 16)",
        }


def subgroup(rank, size):
    """The ranks 1 and 2 of three have a group of their own."""
    group = torch.distributed.new_group([1, 2])
    if rank == 0:
        return None
    calls = list(coherent(2, **SIZES))
    return {
        method: run_calls(parallel(method, process_group=group, threshold=-math.inf), calls, rank - 1, 2)
        for method in ("ring", "ulysses")
    }


def test_a_group_may_be_a_part_of_the_world(tmp_path):
    results = run_ranks(subgroup, 3, tmp_path)
    for step, (q, k, v) in enumerate(coherent(2, **SIZES)):
        dense = flash_attn_func(q, k, v)
        for rank in range(2):
            for method in ("ring", "ulysses"):
                assert_close(results[1 + rank][method][step][0], part(dense, rank, 2), rtol=1e-5, atol=1e-6)


def test_it_needs_a_process_group():
    with pytest.raises(RuntimeError, match=r"process_group: torch\.distributed has none yet"):
        parallel("ring")


def test_merging_is_attention_over_both():
    q, k, v = next(coherent(1))
    whole, whole_lse = skip_attention(q, k, v, SkipList.fresh(2, 4, 40, 90, tile=TILE), -math.inf)
    parts = [flash_attn_func(q, k[:, x], v[:, x], return_softmax_lse=True) for x in (slice(0, 30), slice(30, 90))]
    out, lse = merge_attention(*parts[0], *parts[1])
    assert out.dtype == torch.float32
    assert_close(out, whole, rtol=1e-5, atol=1e-6)
    assert_close(lse, whole_lse, rtol=1e-6, atol=1e-5)


def test_merging_rows_without_keys():
    nothing, no_lse = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), -math.inf)
    out, lse = merge_attention(nothing, no_lse, nothing, no_lse)
    assert torch.equal(out, nothing) and torch.equal(lse, no_lse)
    some, some_lse = torch.randn(1, 3, 2, 4).bfloat16(), torch.tensor([-1e30, 0.0, 1e30]).expand(1, 2, 3)
    for merged in (merge_attention(some, some_lse, nothing, no_lse), merge_attention(nothing, no_lse, some, some_lse)):
        assert torch.equal(merged[0], some.float()) and torch.equal(merged[1], some_lse)


def test_parts_of_one_process_can_be_merged_by_hand():
    """As a caller does who moves keys between ranks by other means."""
    q, k, v = next(coherent(1))
    attention = module(threshold=-math.inf)
    first = attention(q, k[:, :45], v[:, :45], None, True, stream="0")
    second = attention(q, k[:, 45:], v[:, 45:], None, True, stream="1")
    assert_close(merge_attention(*first, *second)[0], flash_attn_func(q, k, v), rtol=1e-5, atol=1e-6)
