"""Decoding from listed pages with pipeline and data parallelism: the tokens and the counts of one engine.

In float32, so that rounding doesn't choose tokens. Lists are made short: from 60 tokens on, with only the newest 24
always read.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys

import aiohttp
import pytest
import random_model
from engine import IN_ONE_PROCESS, generate_by_lists
from processes import environment
from serving import Server, free_port

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
    """Two workers, each with half of the layers: all of them are listed and counted, and rows once."""
    # vLLM's worker on the CPU makes room for what the stage before hands on in a dummy run alone, asserts that there is
    # some, and with `enforce_eager` has had no such run.
    rounds = [{"dummy": True}, ROUND]
    reported = generate_by_lists(model, rounds, LISTS, **ENGINE, pipeline_parallel_size=2)
    assert reported["rounds"] == one["rounds"]
    shares, due = (each["stats"].pop("read_by_layers") for each in (reported, one))
    assert shares == pytest.approx(due)
    assert reported["stats"] == pytest.approx(one["stats"])


@pytest.fixture
def server(model, tmp_path):
    """A server of two engines."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--data-parallel-size", "2", "--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--block-size", "16", "--num-gpu-blocks-override", str(PAGES)]
    command += ["--attention-backend", "LITE_ATTENTION", "--additional-config", json.dumps({"lite_attention": LISTS})]
    # Each engine has its worker in its process, as in `engine.py`.
    with Server(command, port, tmp_path / "log", environment(**IN_ONE_PROCESS)) as running:
        try:
            running.wait_healthy(timeout=600)
        except Exception:
            print(running.output()[-6000:])
            raise
        yield running


async def complete(http: aiohttp.ClientSession, model: str, prompt: list[int], engine: int) -> list[int]:
    """The tokens that follow by this engine of the server."""
    body = SAMPLING | {"model": model, "prompt": prompt, "return_token_ids": True}
    async with http.post("/v1/completions", json=body, headers={"X-data-parallel-rank": str(engine)}) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer["choices"][0]["token_ids"]


async def test_data_parallel(server, model, one):
    """Every prompt by either engine, while the other one decodes, too: `/metrics` has the sum of both."""
    async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(total=600)) as http:
        asked = [(prompt, engine) for prompt in PROMPTS for engine in (0, 1)]
        found = await asyncio.gather(*(complete(http, model, *each) for each in asked))
        await asyncio.sleep(2.5)  # until the workers have written what they counted
        async with http.get("/metrics") as response:
            text = await response.text()
    due = [tokens for (tokens,) in one["rounds"][0]["tokens"]]
    assert found == [tokens for tokens in due for _ in (0, 1)]
    pattern = r'^vllm:request_success_total{engine="(.)",finished_reason="length",.*} (\S+)$'
    done = re.findall(pattern, text, re.MULTILINE)
    assert sorted(done) == [("0", f"{len(PROMPTS)}.0"), ("1", f"{len(PROMPTS)}.0")]
    metrics = {name: float(value) for name, value in re.findall(r"^lite_attention:(\S+) (\S+)$", text, re.MULTILINE)}
    stats = one["stats"]
    assert metrics['decode_rows_total{attention="listed"}'] == 2 * stats["rows_listed"]
    assert metrics['decode_rows_total{attention="dense"}'] == 2 * stats["rows_dense"]
    assert metrics["sketch_bytes"] == 2 * stats["sketch_bytes"]
    for name, total in (("pages_read_total", stats["read"]), ("pages_visible_total", stats["visible"])):
        assert sum(metrics[f'{name}{{layers="{group}"}}'] for group in ("first", "middle", "last")) == 2 * total
