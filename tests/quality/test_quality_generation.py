"""Greedy outputs beside those of dense attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from quality_models import write_model, write_text

from lite_attention.quality import generation
from lite_attention.quality.generation import compare, greedy, make_prompts, measure_agreement
from lite_attention.quality.load import load
from lite_attention.quality.setting import DENSE, Setting
from lite_attention.quality.texts import read_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder, torch.device("cpu"), "auto")


@pytest.fixture(scope="module")
def prompts(loaded, tmp_path_factory):
    path = write_text(tmp_path_factory.mktemp("text") / "text.txt", 900)
    return make_prompts(read_texts([path], loaded[1]), loaded[1], 100, 300, 4)


def test_prompts_are_of_all_lengths_and_places(prompts):
    assert [len(prompt) for prompt in prompts] == [100, 167, 233, 300]
    assert len({tuple(prompt[:5].tolist()) for prompt in prompts}) == 4


@pytest.mark.parametrize("at_once", [3, 8])
def test_dense_outputs_are_those_of_transformers(at_once, folder, loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(generation, "most_sequences", lambda model, tokens: at_once)
    outputs = {}

    def kept(tokenizer, prompts, dense, listed, setting):
        outputs[DENSE], outputs[setting] = dense, listed
        return compare(tokenizer, prompts, dense, listed, setting)

    monkeypatch.setattr(generation, "compare", kept)
    everything, little = measure_agreement(model, tokenizer, prompts, 12, [Setting(0.0), Setting(0.6, newest=1)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, ours in zip(prompts, outputs[DENSE], strict=True):
        said = prompt
        with torch.inference_mode():
            for _ in range(12):
                said = torch.cat([said, theirs(said[None]).logits[0, -1:].argmax(-1)])
        assert torch.equal(ours, said[-12:])
    assert everything.same == 4 and everything.agreed == [12] * 4 and not everything.differences
    assert little.same < 4 and min(little.agreed) >= 1  # the first token is the prefill's


def test_the_first_difference_is_shown_from_both_sides(loaded):
    _, tokenizer = loaded
    dense = [torch.arange(1, 31), torch.arange(1, 31)]
    listed = [torch.arange(1, 31), torch.cat([torch.arange(1, 21), torch.arange(40, 50)])]
    found = compare(tokenizer, [torch.arange(7), torch.arange(9)], dense, listed, Setting(0.1))
    (one,) = found.differences
    assert found.agreed == [30, 20] and found.same == 1 and (one.prompt, one.prompt_tokens, one.at) == (1, 9, 20)
    assert one.both == " ".join(f"w{n}" for n in range(9, 21))
    assert one.dense == " ".join(f"w{n}" for n in range(21, 31))
    assert one.listed == " ".join(f"w{n}" for n in range(40, 50))


def test_greedy_goes_on_from_the_first_tokens():
    class Counting:
        def decode(self, rows, tokens, setting):
            return torch.nn.functional.one_hot(tokens + 1, 50).float()

    assert greedy(Counting(), torch.tensor([3, 30]), 4, DENSE).tolist() == [[3, 4, 5, 6], [30, 31, 32, 33]]
