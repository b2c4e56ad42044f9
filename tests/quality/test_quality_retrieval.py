"""Cases with needles in them, and what counts as found."""

from __future__ import annotations

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lite_attention.quality import retrieval
from lite_attention.quality.retrieval import BOXES, NEEDLES, make_cases, measure_retrieval
from lite_attention.quality.setting import DENSE, Setting
from lite_attention.quality.texts import Text, tokens_of

LISTED = Setting(0.1)


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def texts(tokenizer):
    return [Text(name, tokens_of(tokenizer, f"{name} goes on and on. " * 500)) for name in ("Hay", "Straw")]


@pytest.mark.parametrize("kind", NEEDLES)
def test_cases_have_their_needles_at_their_depths(kind, tokenizer, texts):
    cases = make_cases(kind, texts, tokenizer, 3000, 5)
    for n, case in enumerate(cases):
        assert len(case.context) + len(case.question) == 3000
        context, question = tokenizer.decode(case.context), tokenizer.decode(case.question)
        assert ("Hay" if n % 2 == 0 else "Straw") in context
        if kind == "passkey":
            codes = {"": re.findall(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.", context)}
            asked = ""
        else:
            codes = {box: re.findall(rf"The code of box {box} is (\d{{5}})\.\n", context) for box in BOXES}
            asked = question[-4]
            assert question == f"\nWhat is the code of box {asked}? The code of box {asked} is"
        assert all(len(found) == 1 for found in codes.values()) and codes[asked] == [case.answer]
        assert context.index(case.answer) / len(context) == pytest.approx(n / 4, abs=0.15)
        assert case.answer not in question
    assert len({case.answer for case in cases}) == 5


class Reader:
    """In place of a Decoder: knows the answers of the cases whose numbers `knows` has for the setting."""

    def __init__(self, tokenizer, cases, knows):
        self.tokenizer, self.cases, self.knows, self.rows, self.model = tokenizer, cases, knows, {}, None

    def __call__(self, model, batch, room, sketch_bits):
        self.model, self.most = model, batch
        return self

    def prefill(self, row, tokens):
        assert row < self.most
        self.rows[row] = next(n for n, case in enumerate(self.cases) if torch.equal(case.context, tokens))

    def truncate(self, row, length):
        self.said = dict.fromkeys(self.rows, -1)
        assert length in (0, len(self.cases[self.rows.get(row, 0)].context))

    def decode(self, rows, tokens, setting):
        logits = torch.zeros(len(rows), tokens.shape[1], len(self.tokenizer))
        for i, row in enumerate(rows):
            case = self.cases[self.rows[row]]
            right = self.rows[row] in self.knows[setting]
            says = tokens_of(self.tokenizer, f" {case.answer if right else 'none'}, I think")
            self.said[row] += 1
            logits[i, -1, says[self.said[row]]] = 1
        return logits


@pytest.mark.parametrize("at_once", [1, 4, 6])
def test_what_is_found_is_counted(at_once, tokenizer, texts, monkeypatch):
    cases = make_cases("passkey", texts, tokenizer, 2000, 6)
    knows = {DENSE: {0, 2, 3, 5}, LISTED: {0, 1, 5}}
    monkeypatch.setattr(retrieval, "Decoder", Reader(tokenizer, cases, knows))
    monkeypatch.setattr(retrieval, "most_sequences", lambda model, tokens: at_once)

    class Model:
        device = torch.device("cpu")

    dense, listed = measure_retrieval(Model(), tokenizer, "passkey", 2000, cases, [LISTED])
    assert (dense.setting, dense.cases, dense.found, dense.lost) == (DENSE, 6, 4, 0)
    assert (listed.setting, listed.cases, listed.found, listed.lost) == (LISTED, 6, 3, 2)
