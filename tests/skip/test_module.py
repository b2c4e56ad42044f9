"""`LiteAttention` beside the functional API, call by call: whose list it is, when it starts afresh, what changes it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_close
from steps import TILE, assert_same, coherent, fresh, functional, module
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention import flash_attn_func, skip_attention


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (80, 60)}, {"backend": "reference"}], ids=str
)
def test_calls_are_those_of_the_functional_api_and_skip_more_and_more(options):
    calls = list(coherent(6))
    expected = functional(calls, **options)
    attention = module(stats_steps=6, **options)
    assert_same(attention, calls, expected)
    sparsity = attention.stats()["default"].sparsity.mean(1)
    assert sparsity[0] == 0 and sparsity[1] > 0.05
    assert (sparsity.diff() >= 0).all() and sparsity[-1] > sparsity[1] + 0.1


def test_the_scale_and_forced_tiles_reach_the_call():
    calls = list(coherent(3))
    do, skip = [(0, 3)], [[(16, 40)], [(0, 90)]]
    expected = functional(calls, softmax_scale=0.5, must_do=do, must_skip=skip)
    assert_same(module(), calls, expected, scale=0.5, must_do_list=do, must_skip_list=skip)
    plain = functional(calls)
    assert not any(torch.equal(x[0], y[0]) for x, y in zip(expected, plain, strict=True))


def test_forced_tiles_may_change_between_calls():
    """Masks of the last call are kept; they are not those of other ranges, nor of a list that was changed since."""
    (q, k, v), *_ = coherent(1)
    attention = module(threshold=-math.inf)
    ranges = [(0, 16)]
    for _ in range(3):
        expected, _ = skip_attention(q, k, v, fresh(q, k), -math.inf, must_skip=ranges)
        assert torch.equal(attention(q, k, v, must_skip_list=ranges), expected)
        ranges[0] = (0, ranges[0][1] + 16)
    tensor = torch.tensor([[[0, 64]], [[8, 16]]], dtype=torch.int32)
    mask = attention.skip_list().must_skip_mask(tensor)
    expected, _ = skip_attention(q, k, v, fresh(q, k), -math.inf, must_skip=tensor)
    for given in (tensor, mask):
        assert torch.equal(attention(q, k, v, must_skip_list=given), expected)


def test_a_prompt_does_not_get_the_list_of_the_one_before():
    prompts = [list(coherent(4, seed)) for seed in (1, 2)]
    attention, careless = module(num_steps=4), module()
    for prompt in prompts:
        assert_same(attention, prompt, functional(prompt))
    (q, k, v), *_ = prompts[1]
    for call in prompts[0]:
        careless(*call)
    assert not torch.equal(careless(q, k, v), flash_attn_func(q, k, v))  # which is what would leak


def test_each_stream_counts_its_own_steps():
    calls = list(coherent(5))
    attention = module(num_steps=3)
    attention(*calls[0], stream="late")
    assert_same(attention, calls, functional(calls, refresh=(3,)), stream="early")
    assert_same(attention, calls[1:], functional(calls, refresh=(3,))[1:], stream="late")


def test_streams_never_share_a_list():
    branches = {"cond": list(coherent(4, 1)), "uncond": list(coherent(4, 2))}
    expected = {name: functional(calls) for name, calls in branches.items()}
    attention = module()
    for step in range(4):
        for name, calls in branches.items():
            assert_same(attention, calls[step : step + 1], expected[name][step : step + 1], stream=name)
    assert attention.streams == ("cond", "uncond")
    assert attention.skip_list("cond").bits.data_ptr() != attention.skip_list("uncond").bits.data_ptr()
    attention.reset_skip_state("cond")
    assert attention.skip_list("cond").visits().all() and not attention.skip_list("uncond").visits().all()
    attention.reset_skip_state()
    assert attention.skip_list("uncond").visits().all()
    attention.drop_skip_state("cond")
    assert attention.streams == ("uncond",)


def test_lists_follow_a_batch_that_is_reordered():
    calls, order = list(coherent(5, batch=3)), torch.tensor([2, 0, 1])
    expected = [tuple(x[order] for x in result) for result in functional(calls)]
    attention = module()
    for call in calls[:2]:
        attention(*call)
    attention.reorder_batch(order)
    assert_same(attention, [tuple(x[order] for x in call) for call in calls[2:]], expected[2:])


CHANGES = {
    "batch": {"batch": 3},
    "seqlen_q": {"seqlen_q": 41},
    "seqlen_k": {"seqlen_k": 91},
    "heads": {"heads": 6},
    "heads_k": {"heads_k": 4},
    "head_dim": {"dim": 18},
    "dtype": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("change", CHANGES)
def test_calls_of_another_shape_or_dtype_start_afresh(change):
    attention = module()
    for call in coherent(3):
        attention(*call)
    calls = list(coherent(3, **CHANGES[change]))
    assert_same(attention, calls, functional(calls))
    first = list(coherent(2))
    assert_same(attention, first, functional(first))  # nor does the first list come back


def test_calls_on_another_device_start_afresh():
    attention, calls = module(), list(coherent(3))
    for call in calls:
        attention(*call)
    attention.skip_list().bits = attention.skip_list().bits.to("meta")  # as if the calls before had been there
    assert_same(attention, calls, functional(calls))


def test_a_cuda_graph_does_not_make_a_state(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    attention = module(backend="reference")
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = torch.empty(2, 40, 4, 16, device="cuda"), torch.empty(2, 90, 2, 16, device="cuda")
        with pytest.raises(RuntimeError, match="make the call once before the capture"):
            attention(q, k, k)
    assert not attention.streams


def test_all_tiles_are_visited_again_at_a_refresh():
    calls = list(coherent(8))
    attention = module(refresh_every=3, stats_steps=8)
    assert_same(attention, calls, functional(calls, refresh=(3, 6)))
    skipped = attention.stats()["default"].sparsity.mean(1) > 0
    assert skipped.tolist() == [False, True, True, False, True, True, False, True]


def test_refreshes_count_from_the_start_of_a_sequence():
    calls = list(coherent(8))
    assert_same(module(refresh_every=3, num_steps=4), calls, functional(calls, refresh=(3, 4, 7)))


def test_a_reset_counts_from_the_start():
    calls = list(coherent(6))
    attention = module(num_steps=4)
    for call in calls[:2]:
        attention(*call)
    attention.reset_skip_state()
    assert_same(attention, calls, functional(calls, refresh=(4,)))


def test_a_refused_call_is_no_step_and_leaves_the_list():
    calls = list(coherent(6))
    attention = module(num_steps=4)
    expected = functional(calls, refresh=(4,))
    for step in range(6):
        q, k, v = calls[step]
        with pytest.raises(ValueError, match="v: got shape"):
            attention(q, k, v[:, 1:])
        with pytest.raises(ValueError, match="softmax_scale: got -1"):
            attention(q, k, v, scale=-1)
        with pytest.raises(ValueError, match="must_do: got"):
            attention(q, k, v, must_do_list=[(0, 91)])
        assert_same(attention, calls[step : step + 1], expected[step : step + 1])


def test_a_refused_call_makes_no_list():
    attention = module(backend="hopper")
    with pytest.raises(ValueError, match="backend: got 'hopper' for tensors on cpu"):
        attention(*next(coherent(1)))
    assert not attention.streams


def test_disabled_calls_are_dense_and_lists_go_on_after():
    calls = list(coherent(6))
    expected = functional([calls[0], calls[1], calls[4], calls[5]])
    attention = module(stats_steps=6)
    assert_same(attention, calls[:2], expected[:2])
    attention.enable_skip_optimization(False)
    for q, k, v in calls[2:4]:
        assert torch.equal(attention(q, k, v), flash_attn_func(q, k, v))
        assert torch.equal(attention.skip_list().bits, expected[1][2])
    attention.enable_skip_optimization(True)
    assert_same(attention, calls[4:], expected[2:])
    skipped = attention.stats()["default"].sparsity.mean(1) > 0
    assert skipped.tolist() == [False, True, False, False, True, True]


def test_disabled_calls_are_steps():
    prompts = [list(coherent(4, seed)) for seed in (1, 2)]
    attention = module(num_steps=4)
    for prompt in prompts:
        attention.enable_skip_optimization(False)
        for call in prompt[:2]:
            attention(*call)
        attention.enable_skip_optimization()
        assert_same(attention, prompt[2:], functional(prompt[2:]))


def test_disabled_from_the_start():
    (q, k, v), *_ = coherent(1)
    attention = module(enable_skipping=False)
    out, lse = attention(q, k, v, return_softmax_lse=True)
    dense, dense_lse = flash_attn_func(q, k, v, return_softmax_lse=True)
    assert torch.equal(out, dense) and torch.equal(lse, dense_lse)


def test_must_skip_holds_while_disabled():
    (q, k, v), (q_next, _, _) = coherent(2)
    attention = module()
    attention(q, k, v)
    bits = attention.skip_list().bits.clone()
    attention.enable_skip_optimization(False)
    got = attention(q_next, k, v, must_do_list=[(0, 4)], must_skip_list=[(0, 40)])
    expected = flash_attn_func(q_next, *(torch.cat((x[:, :8], x[:, 40:]), dim=1) for x in (k, v)))
    assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(attention.skip_list().bits, bits)


NEW_THRESHOLDS = {
    "a number": -1.0,
    "infinite": -math.inf,
    "one a head": [-1.0, -2.0, -0.5, -9.0],
    "a tensor": torch.tensor(-1.0),
    "a tensor of heads": torch.tensor([-1.0, -2.0, -0.5, -9.0]),
}


@pytest.mark.parametrize("new", NEW_THRESHOLDS.values(), ids=NEW_THRESHOLDS)
def test_a_new_threshold_is_written_where_the_old_one_was(new):
    (first, second, third), attention = coherent(3), module()
    attention(*first)
    address = attention._states["default"].threshold.data_ptr()  # what a CUDA graph would read
    attention.set_threshold(new)
    assert attention._states["default"].threshold.data_ptr() == address
    skip_list, tensor = fresh(*first[:2]), torch.as_tensor(new)
    skip_attention(*first, skip_list, -3.0)
    for call in (second, third):
        expected, lse = skip_attention(*call, skip_list, tensor)
        assert_same(attention, [call], [(expected, lse, skip_list.bits)])
    assert_same(attention, [first, second], functional([first, second], tensor), stream="new")  # also of later streams
    assert torch.equal(attention.threshold, tensor)


def test_thresholds_a_head_are_those_of_the_heads():
    calls, thresholds = list(coherent(3)), [-8.0, -4.0, -2.0, -0.1]
    attention = module(threshold=thresholds, stats_steps=3)
    assert_same(attention, calls, functional(calls, torch.tensor(thresholds)))
    assert (attention.stats()["default"].now.diff() > 0).all()


def test_a_threshold_of_minus_infinity_is_dense_attention():
    attention = module(threshold=-math.inf)
    for q, k, v in coherent(3):
        assert_close(attention(q, k, v), flash_attn_func(q, k, v), rtol=1e-5, atol=1e-6)
    assert attention.skip_list().visits().all()


def test_tiles_are_the_kernels_unless_given():
    (q, k, v), *_ = coherent(1, seqlen_q=300, seqlen_k=200, dim=128)
    attention = module(tile=None)
    attention(q, k, v)
    assert (attention.skip_list().block_m, attention.skip_list().block_n) == (128, 176)
    attention = module(tile=TILE)
    attention(q, k, v)
    assert (attention.skip_list().block_m, attention.skip_list().block_n) == TILE


REFUSALS = [
    ({"threshold": 0.1}, "threshold: got 0.1"),
    ({"threshold": math.nan}, "threshold: got nan"),
    ({"threshold": [-1.0, 2.0]}, r"threshold: got \[-1.0, 2.0\]"),
    ({"threshold": "-1"}, "threshold: got -1; needs a number of at most 0, one for each head, or a float32 tensor"),
    ({"threshold": True}, "threshold: got True"),
    ({"threshold": torch.zeros(2, 2)}, r"threshold: got torch.float32 of \(2, 2\)"),
    ({"threshold": torch.zeros(2).double()}, r"threshold: got torch.float64 of \(2,\)"),
    ({"num_steps": 0}, "num_steps: got 0; needs a positive int, or None"),
    ({"num_steps": 2.0}, "num_steps: got 2.0"),
    ({"refresh_every": -1}, "refresh_every: got -1"),
    ({"refresh_every": True}, "refresh_every: got True"),
    ({"stats_steps": -1}, "stats_steps: got -1; needs 0 or a positive int"),
    ({"stats_steps": None}, "stats_steps: got None"),
    ({"enable_skipping": 1}, "enable_skipping: got 1; needs True or False"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=str)
def test_what_the_module_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_what_calls_and_methods_refuse():
    (q, k, v), *_ = coherent(1)
    with pytest.raises(ValueError, match=r"threshold: got shape \(3,\); needs \(\) or \(4,\), as q has heads"):
        module(threshold=[-1.0] * 3)(q, k, v)
    attention = module()
    with pytest.raises(ValueError, match="stream: got 'cond'; needs one that had a call: none"):
        attention.skip_list("cond")
    attention(q, k, v)
    for given, message in (
        ([-1.0] * 3, "threshold: got 3 values; needs one, or one for each of 4 heads"),
        (0.5, "threshold: got 0.5"),
        (None, "threshold: got None"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.set_threshold(given)
    assert attention.threshold == -3
    for order in (None, torch.tensor([0]), torch.tensor([1, 0]).int()):
        with pytest.raises(ValueError, match=r"order: got .*; needs a tensor of torch.int64 of \(2,\)"):
            attention.reorder_batch(order)
    with pytest.raises(ValueError, match="stream: got None; needs a name, as 'cond'"):
        attention(q, k, v, stream=None)
    with pytest.raises(ValueError, match="stream: got 'other'; needs one that had a call: 'default'"):
        attention.reorder_batch(torch.tensor([1, 0]), "other")
    with pytest.raises(NotImplementedError, match="requires grad"):
        attention(q.requires_grad_(), k, v)
