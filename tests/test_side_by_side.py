"""How long outputs of two engines agree, and what is written of it: with outputs made up, and a letter for a token."""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import code_prompts
import side_by_side
import vllm_code
from side_by_side import Outputs, agreement, markdown

PEER = vllm_code.PEER
DENSE = [
    "the cat sat on the mat, and the dog",
    "def f(x):\n    return x | `1` + 2 * x",
    "import os, sys\n",
    "alike" * 8,
]
LISTS = [
    "the cat sat on the mat, and ran off",
    "def f(x):\n    return x || `1` + 2 * x",
    "export os, sys\n",
    "alike" * 8,
]
AT = [28, 24, 0]  # where they part
LENGTH = min(map(len, DENSE))


def tokens(text: str) -> list[int]:
    return [*map(ord, text)]


def decode(found: list[int]) -> str:
    return "".join(map(chr, found))


def outputs(texts: list[str], length: int | None = None) -> Outputs:
    return Outputs([8192, 16384, 24576, 32768][: len(texts)], [tokens(text[:length]) for text in texts])


def cells(text: str, prompt: int) -> list[str]:
    """Of the table of differences, the cells of a prompt."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {prompt} (")]
    return [cell.strip() for cell in line.replace("\\|", "PIPE").split("|")[1:-1]]


def test_tokens_before_the_first_that_differs():
    found = agreement(outputs(LISTS, 30), outputs(DENSE, 30))
    assert found.of_tokens == LENGTH == 15  # as many as all outputs have
    assert found.agreed == [15, 15, 0, 15] and found.same == 3
    longer = agreement(outputs(LISTS[:2]), outputs(DENSE[:2]))
    assert longer.of_tokens == 35 and longer.agreed == AT[:2] and longer.same == 0
    assert [longer.lasted(each) for each in (24, 25, 28, 29)] == [1.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("other", [outputs(DENSE[:3]), Outputs([8192, 16384, 24576, 1], outputs(DENSE).tokens)])
def test_outputs_of_other_prompts_are_refused(other):
    with pytest.raises(ValueError, match="or of other lengths"):
        agreement(outputs(LISTS), other)


def test_the_first_differences_are_side_by_side():
    text = markdown({PEER: outputs(DENSE[:2]), "eps=0.1": outputs(LISTS[:2])}, PEER, decode)
    assert "2 prompts of 8192 to 16384 tokens" in text
    assert cells(text, 1) == ["1 (8192 tokens)", "28", "` he mat, and  `", "` the dog `", "` ran off `"]
    # On one line, in fences longer than those in it, and no cell ends at a pipe.
    both, dense, lists = "`   return x PIPE `", "``  `1` + 2 * x ``", "`` PIPE `1` + 2 * x ``"
    assert cells(text, 2) == ["2 (16384 tokens)", "24", both, dense, lists]


def test_the_distribution_is_told():
    dense = [[0] * 100 for _ in range(64)]
    agreed = [100] * 16 + [3 + 2 * i for i in range(48)]
    listed = [row[:at] + [1] * (100 - at) for row, at in zip(dense, agreed, strict=True)]
    lengths = [28000] * 64
    text = markdown({"eps=0.1": Outputs(lengths, listed), PEER: Outputs(lengths, dense)}, PEER, lambda found: "x")
    assert "64 prompts of 28000 tokens" in text
    low, median, high = statistics.quantiles(agreed, n=4, method="inclusive")
    summary = (
        f"| eps=0.1 | 16 of 64, 25.0% | {median:g} of 100 | {low:g} to {high:g} | {statistics.fmean(agreed):.1f} | 3 |"
    )
    assert summary in text
    assert "| engine | 1 | 2 | 4 | 8 | 16 | 32 | 64 | 100 |" in text
    shares = " | ".join(f"{sum(each >= n for each in agreed) / 64:.1%}" for n in (1, 2, 4, 8, 16, 32, 64, 100))
    assert f"| eps=0.1 | {shares} |" in text
    assert sum(line.endswith("| ` x ` | ` x ` | ` x ` |") for line in text.splitlines()) == 48  # every difference


def test_outputs_that_are_the_same_have_no_table():
    text = markdown({PEER: outputs(DENSE), "eps=0": outputs(DENSE)}, PEER, decode)
    assert f"All outputs are the same for {LENGTH} tokens." in text and "goes on" not in text


# Engines, in one run or apart


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `vllm_code.py` with engines that answer as above; returns its results."""

    class Engines:
        def __init__(self, commands: dict[str, list[str]]) -> None:
            self.names = list(commands)

        def __enter__(self) -> Engines:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self, name: str) -> dict:
            made = outputs(DENSE if name == PEER else LISTS)
            times = {"ms_per_token": 5.0 if name == PEER else 2.0, "ms_quartiles": [1, 2, 3], "prefill_s": 1.0}
            return times | {"requests": len(DENSE), "outputs": vars(made)}

    monkeypatch.setattr(vllm_code, "Engines", Engines)
    monkeypatch.setattr(vllm_code, "machine", dict)
    monkeypatch.setattr(vllm_code, "prompts_for", lambda arguments: [])
    monkeypatch.setattr(vllm_code, "decoder", lambda model: decode)
    monkeypatch.setattr(side_by_side, "decoder", lambda model: decode)
    values = {
        "model": Path("model"),
        "steps": 64,
        "quick": False,
        "profile": False,
        "gpu_memory": None,
        "commit": "c0ffee",
    }

    def run(name: str, *engines: str) -> dict:
        return vllm_code.measure(Namespace(**values, only=engines, out=tmp_path / name))

    return run


def test_engines_of_one_run_are_compared(run, tmp_path):
    results = run("both.json", "eps=0.1", PEER)
    assert results["eps=0.1"]["agreement"] == {"same": 3, "median": 15, "mean": 11.25, "of_tokens": LENGTH}
    written = (tmp_path / "both.differences.md").read_text()
    assert written == markdown({"eps=0.1": outputs(LISTS), PEER: outputs(DENSE)}, PEER, decode)
    assert json.loads((tmp_path / "both.json").read_text()) == results


def test_engines_that_ran_apart_are_compared(run, tmp_path, monkeypatch, capsys):
    run("lists.json", "eps=0.1")
    run("dense.json", PEER)
    assert not list(tmp_path.glob("*.md"))
    table = vllm_code.table_of([tmp_path / "lists.json", tmp_path / "dense.json"])
    assert "| eps=0.1 | 2.00 | 1.00 to 3.00 | 2.50 |" in table
    assert "3 of 4, median 15 of 15" in table
    files = [str(tmp_path / f"{name}.outputs.json") for name in ("lists", "dense")]
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", "model", *files, "--out", str(tmp_path / "apart.md")])
    side_by_side.main()
    expected = markdown({"eps=0.1": outputs(LISTS), PEER: outputs(DENSE)}, PEER, decode)
    assert (tmp_path / "apart.md").read_text() == expected
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", "model", files[0]])
    with pytest.raises(SystemExit):
        side_by_side.main()
    assert "needs FLASH_ATTN and another engine" in capsys.readouterr().err


def test_prompts_of_many_lengths_have_no_part_twice(monkeypatch):
    class Tokenizer:
        def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[Namespace]:
            return [Namespace(ids=tokens(text)) for text in texts]

    monkeypatch.setattr(code_prompts, "sources", lambda: iter(["abcdefgh", "ijklmnop"]))
    assert [*map(decode, code_prompts.code_prompts(Tokenizer(), [2, 5, 3]))] == ["ab", "cdefg", "hij"]
    assert vllm_code.lengths("8192-32768") == (8192, 32768) and vllm_code.lengths("28000") == (28000, 28000)
