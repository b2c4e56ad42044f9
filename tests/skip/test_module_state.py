"""Where a module's lists live: state dicts, copies, moves and casts of the model, inference mode."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from steps import assert_same, coherent, functional, module
from torch import nn


class Layer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.project = nn.Linear(2, 2)
        self.attention = module(**options)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_dicts_have_the_lists_only_if_asked():
    for save_state in (False, True):
        layer = Layer(save_state=save_state)
        layer.attention(*next(coherent(1)))
        entries = [key for key in layer.state_dict() if not key.startswith("project")]
        assert (len(entries) > 0) == save_state
        assert not list(layer.buffers()) and len(list(layer.parameters())) == 2


def test_a_loaded_list_goes_on_where_it_was_saved():
    calls = {"cond": list(coherent(6, 1)), "un.cond": list(coherent(6, 2, dtype=torch.bfloat16))}
    expected = {stream: functional(calls[stream], refresh=(4,)) for stream in calls}
    saving, loading = (Layer(save_state=True, num_steps=4) for _ in range(2))
    for stream in calls:
        assert_same(saving.attention, calls[stream][:2], expected[stream][:2], stream=stream)
    saved = through_a_file(saving.state_dict())
    for call in coherent(3):
        loading.attention(*call, stream="cond")  # which the saved list replaces
    loading.load_state_dict(saved)
    again = through_a_file(loading.state_dict())
    assert again.keys() == saved.keys() and all(torch.equal(again[key], saved[key]) for key in saved)
    for stream in calls:
        for layer in (saving, loading):
            assert_same(layer.attention, calls[stream][2:], expected[stream][2:], stream=stream)


def test_what_was_saved_is_not_changed_by_later_calls():
    attention = module(save_state=True)
    calls = list(coherent(3))
    attention(*calls[0])
    saved = attention.state_dict()
    before = {key: x.clone() for key, x in saved.items()}
    for call in calls:
        attention(*call)
    assert all(torch.equal(saved[key], before[key]) for key in saved)


def test_a_list_of_other_calls_is_not_loaded():
    calls = list(coherent(3))
    saving, loading = module(save_state=True), module(save_state=True)
    for call in coherent(3, seqlen_k=88):  # as many tiles
        saving(*call)
    loading.load_state_dict(saving.state_dict())
    assert_same(loading, calls, functional(calls))


def test_a_reset_forgets_what_was_loaded():
    calls = list(coherent(3))
    saving, loading = module(save_state=True), module(save_state=True)
    for call in calls:
        saving(*call)
    for forget in (loading.reset_skip_state, loading.drop_skip_state):
        for arguments in ((), ("default",)):
            loading.load_state_dict(saving.state_dict())
            forget(*arguments)
            assert_same(loading, calls, functional(calls))
            loading.reset_skip_state()


def test_modules_that_do_not_save_state_refuse_it():
    attention = module(save_state=True)
    attention(*next(coherent(1)))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"skip_state.default.bits"'):
        module().load_state_dict(attention.state_dict())


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("bits", torch.zeros(2, 4, 5, 2, dtype=torch.int32), r"bits: got shape \(2, 4, 5, 2\); needs \(2, 4, 5, 1\)"),
        ("bits", torch.zeros(2, 4, 5, 1), "bits: got torch.float32; needs torch.int32"),
        ("bits", None, "skip_state: got no bits"),
        ("calls", torch.tensor(-1), "calls = -1"),
        ("calls", torch.tensor([1, 2]), r"calls = \[1, 2\]"),
        ("shape", torch.arange(9), "shape = "),
        ("shape", torch.tensor([2, 40, 4, 16, 2, 90, 2, 16, 8, 0]), "shape = "),
        ("shape", torch.tensor([2, 40, 4, 16, 2, 900, 2, 16, 8, 8]), r"bits: got shape \(2, 4, 5, 1\)"),
    ],
)
def test_a_corrupted_list_is_refused(entry, value, message):
    attention = module(save_state=True)
    attention(*next(coherent(1)))
    saved = attention.state_dict() | {f"skip_state.default.{entry}": value}
    with pytest.raises(RuntimeError, match=message):
        module(save_state=True).load_state_dict(saved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_have_lists_of_their_own(copied):
    calls = list(coherent(4))
    expected = functional(calls)
    attention = module()
    for call in calls[:2]:
        attention(*call)
    twin = copied(attention)
    assert_same(attention, calls[2:], expected[2:])
    assert torch.equal(twin.skip_list().bits, expected[1][2])
    twin.set_threshold(-1.0)
    assert attention.threshold == -3
    twin.set_threshold(-3.0)
    assert_same(twin, calls[2:], expected[2:])


def test_moves_and_casts_of_the_model_leave_lists_alone():
    calls = list(coherent(4))
    expected = functional(calls, -2.7)
    layer = Layer(threshold=-2.7)  # which bfloat16 would round
    for step, change in enumerate((nn.Module.half, nn.Module.bfloat16, lambda x: x.to("meta"), nn.Module.float)):
        change(layer)
        assert_same(layer.attention, calls[step : step + 1], expected[step : step + 1])


@pytest.mark.parametrize("modes", ["inference first", "inference after"])
def test_inference_mode_may_come_and_go(modes):
    calls = list(coherent(6))
    expected = functional(calls)
    attention = module(num_steps=8, stats_steps=8, save_state=True)
    for step in range(6):
        with torch.inference_mode((step % 2 == 0) == (modes == "inference first")):
            assert_same(attention, calls[step : step + 1], expected[step : step + 1])
            assert len(attention.stats()["default"].steps) == step + 1
    with torch.inference_mode(modes == "inference first"):
        attention.set_threshold(-2.0)
        attention.reorder_batch(torch.tensor([1, 0]))
        attention.load_state_dict(attention.state_dict())
        attention.reset_skip_state()
    assert_same(attention, calls, functional(calls, -2.0))


def test_outputs_are_no_inference_tensors_outside_of_it():
    attention = module()
    for call in coherent(2):
        assert not attention(*call).is_inference()
