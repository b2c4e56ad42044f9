"""Decoding from listed pages with pipeline and data parallelism: the tokens and the counts of one engine.

In float32, so that rounding doesn't choose tokens. Lists are made short: from 60 tokens on, with only the newest 24
always read.
"""

from __future__ import annotations

import re

import pytest
import random_model
from engine import IN_ONE_PROCESS, engine_arguments, generate_by_lists
from forks import run_in_fork

LAYERS, HEADS, HEADS_K = 4, 8, 2
PAGES = 200
NEW = 20
LENGTHS = (40, 111, 200)
PROMPTS = random_model.prompts(*LENGTHS)
LISTS = {"eps": 0.3, "min_context": 60, "newest": 24}
SAMPLING = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "detokenize": False}
ROUND = {"prompts": PROMPTS, "sampling": SAMPLING}
ENGINE = {"skip_tokenizer_init": True, "num_gpu_blocks_override": PAGES}


@pytest.fixture(scope="module")
def model(newest, tmp_path_factory) -> str:
    if not newest:
        pytest.skip("tested with the newest vLLM for the CPU")
    folder = tmp_path_factory.mktemp("parallel")
    return random_model.write(folder, layers=LAYERS, heads=HEADS, kv_heads=HEADS_K, head_dim=64)


@pytest.fixture(scope="module")
def one(model):
    """What one engine of one worker reports. Its lists leave out pages, and in each request other tokens follow."""
    reported = generate_by_lists(model, [ROUND], LISTS, **ENGINE)
    stats = reported["stats"]
    assert stats["rows_listed"] > 0 and stats["rows_dense"] > 0
    assert stats["read"] < 0.9 * stats["visible"]
    return reported


def test_pipeline_parallel(model, one):
    """Two workers, each with half of the layers: all of them are listed, counted and told of, and rows once."""
    # vLLM's worker on the CPU makes room for what the stage before hands on in a dummy run alone, asserts that there is
    # some, and with `enforce_eager` has had no such run.
    rounds = [{"dummy": True}, ROUND]
    reported = generate_by_lists(model, rounds, LISTS, **ENGINE, pipeline_parallel_size=2)
    assert reported["rounds"] == one["rounds"]
    shares, due = (each["stats"].pop("read_by_layers") for each in (reported, one))
    assert shares == pytest.approx(due)
    assert reported["stats"] == pytest.approx(one["stats"])
    place = r"; 2 of 2 layers, from model\.layers\.(\d)\.\S+ \(the model has 4, and this is pipeline stage (\d) of 2\)"
    assert sorted(re.findall(place, reported.log)) == [("0", "1"), ("2", "2")]


def test_data_parallel(model, one):
    """Every prompt by either engine, while the other one decodes, too: `/metrics` has the sum of both."""
    engine = engine_arguments(model, LISTS, **ENGINE, data_parallel_size=2)
    # Engines are forks, as the process has imported all that they need; each has its worker in its process.
    variables = IN_ONE_PROCESS | {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    argument = {"engine": engine, "prompts": PROMPTS, "sampling": SAMPLING}
    reported = run_in_fork("probe_replicas.py", argument, **variables)
    due = [tokens for (tokens,) in one["rounds"][0]["tokens"]]
    assert reported["tokens"] == [tokens for tokens in due for _ in (0, 1)]
    pattern = r'^vllm:request_success_total{engine="(.)",finished_reason="length",.*} (\S+)$'
    done = re.findall(pattern, reported["metrics"], re.MULTILINE)
    assert sorted(done) == [("0", f"{len(PROMPTS)}.0"), ("1", f"{len(PROMPTS)}.0")]
    pattern = r"^lite_attention:(\S+) (\S+)$"
    metrics = {name: float(value) for name, value in re.findall(pattern, reported["metrics"], re.MULTILINE)}
    stats = one["stats"]
    assert metrics['decode_rows_total{attention="listed"}'] == 2 * stats["rows_listed"]
    assert metrics['decode_rows_total{attention="dense"}'] == 2 * stats["rows_dense"]
    assert metrics["sketch_bytes"] == 2 * stats["sketch_bytes"]
    for name, total in (("pages_read_total", stats["read"]), ("pages_visible_total", stats["visible"])):
        assert sum(metrics[f'{name}{{layers="{group}"}}'] for group in ("first", "middle", "last")) == 2 * total
