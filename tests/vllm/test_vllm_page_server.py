"""vLLM's HTTP server, decoding from listed pages: what `/metrics` says, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from engine import SMALL
from page_counts import NEARLY_ALL, expected
from processes import environment
from serving import Server, free_port
from texts import PROMPTS

LAYERS, HEADS, HEADS_K, HEAD_SIZE = (SMALL[name] for name in ("layers", "heads", "kv_heads", "head_dim"))
MODEL = "small"
PAGES = 200
NEW = 30


@pytest.fixture(scope="module")
def server(small, newest, tmp_path_factory):
    if not newest:
        pytest.skip("tested with the newest vLLM for the CPU")
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", small, "--port", str(port)]
    command += ["--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--block-size", "16", "--num-gpu-blocks-override", str(PAGES)]
    settings = {"eps": 0.3, "min_context": 60}
    command += ["--additional-config", json.dumps({"lite_attention": settings | {"eps": NEARLY_ALL}})]
    variables = {"LITE_ATTENTION_NEWEST": "24", "LITE_ATTENTION_MIN_CONTEXT": "300", "LITE_ATTENTION_EPS": "0.5"}
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(command, port, log, environment(VLLM_ATTENTION_BACKEND="LITE_ATTENTION", **variables)) as running:
        try:
            running.wait_healthy(timeout=600)
        except Exception:
            print(running.output()[-6000:])
            raise
        yield running


@pytest.fixture
async def http(server):
    async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(total=600)) as session:
        yield session


def body(prompt: str, **changes) -> dict:
    values = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": NEW, "ignore_eos": True}
    return values | {"return_token_ids": True} | changes


async def complete(http: aiohttp.ClientSession, prompt: str) -> tuple[int, list[int]]:
    """How many tokens the prompt has, and the tokens that follow."""
    async with http.post("/v1/completions", json=body(prompt)) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer["usage"]["prompt_tokens"], answer["choices"][0]["token_ids"]


async def metrics(http: aiohttp.ClientSession) -> dict[str, float]:
    """Our metrics by name and labels, once the worker has written them."""
    await asyncio.sleep(2.5)
    async with http.get("/metrics") as response:
        text = await response.text()
    return {name: float(value) for name, value in re.findall(r"^lite_attention:(\S+) (\S+)$", text, re.MULTILINE)}


async def test_metrics_count_what_was_read(http):
    """And nothing of what vLLM ran before it served."""
    before = await metrics(http)
    assert before['decode_rows_total{attention="listed"}'] == before['decode_rows_total{attention="dense"}'] == 0
    due = []
    for prompt in (PROMPTS[0], PROMPTS[4], PROMPTS[7]):
        prompt_tokens, _ = await complete(http, prompt)
        due.append(expected(prompt_tokens, NEW, min_context=60, newest=24))
    found = await metrics(http)
    total = {name: sum(each[name] for each in due) for name in due[0]}
    assert total["rows_dense"] > 0 and total["rows_listed"] > 0
    assert found['decode_rows_total{attention="listed"}'] == total["rows_listed"]
    assert found['decode_rows_total{attention="dense"}'] == total["rows_dense"]
    for group in ("first", "middle", "last"):
        labels = f'{{layers="{group}"}}'
        assert found[f"pages_read_total{labels}"] == total["read"] * HEADS_K * LAYERS // 3
        assert found[f"pages_visible_total{labels}"] == total["visible"] * HEADS_K * LAYERS // 3
        decisions = (total["rows_listed"] + total["rows_dense"]) * HEADS * LAYERS // 3
        assert found[f"decisions_total{labels}"] == decisions
        assert 0 < found[f"left_out_mass_total{labels}"] < decisions
    assert found["sketch_bytes"] == PAGES * LAYERS * 256  # 2 of 112 bytes, and up to a multiple of 256


async def test_a_client_that_leaves_takes_nothing_from_others(http):
    _, alone = await complete(http, PROMPTS[7])

    async def leave() -> None:
        async with http.post("/v1/completions", json=body(PROMPTS[6], stream=True, max_tokens=200)) as response:
            async for _ in response.content:
                break
            response.close()

    (_, tokens), *_ = await asyncio.gather(complete(http, PROMPTS[7]), *(leave() for _ in range(6)))
    assert tokens == alone
    for _ in range(100):
        async with http.get("/metrics") as response:
            running = re.search(r"^vllm:num_requests_running{.*} (\S+)$", await response.text(), re.MULTILINE)
        if float(running[1]) == 0:
            break
        await asyncio.sleep(0.1)
    assert float(running[1]) == 0
    assert (await complete(http, PROMPTS[7]))[1] == alone


def test_seconds_of_mixed_load(server, tmp_path):
    """`benchmarks/vllm_soak.py` on this server. vLLM's engine on the CPU takes no prompt with a seed in parts."""
    script = Path(__file__).parents[2] / "benchmarks" / "vllm_soak.py"
    command = [sys.executable, str(script), "--url", server.url, "--pid", str(server.pid), "--minutes", "0.2"]
    command += ["--rate", "2", "--in-flight", "6", "--patience", "120", "--no-seeds", "--no-preemptions"]
    process = subprocess.run([*command, "--out", str(tmp_path / "soak.json")], capture_output=True, text=True)
    print(process.stdout)
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["counted"]["lite_attention:decode_rows_total"] > 100
    assert result["canaries"]["same"] > 0
    assert result["host_mib"][-1][1] > 100
