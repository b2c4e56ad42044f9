"""vLLM's HTTP server on the CPU, with LITE_ATTENTION chosen by the environment: many clients, some of them rude."""

from __future__ import annotations

import asyncio
import json
import re
import sys

import aiohttp
import pytest
from engine import SMALL
from processes import environment
from serving import Server, free_port
from texts import PROMPTS, SHARED

import lite_attention

MODEL = "small"


@pytest.fixture(scope="module")
def server(small, tmp_path_factory):
    """16 requests at a time on 64 pages of 16 tokens: 32 streams wait, share prefixes and preempt each other."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", small, "--port", str(port)]
    command += ["--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--block-size", "16", "--num-gpu-blocks-override", "64", "--max-num-seqs", "16"]
    command += ["--max-num-batched-tokens", "128"]
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(command, port, log, environment(VLLM_ATTENTION_BACKEND="LITE_ATTENTION")) as running:
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
    values = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 64, "ignore_eos": True}
    return values | {"return_token_ids": True} | changes


async def complete(http: aiohttp.ClientSession, prompt: str) -> list[int]:
    async with http.post("/v1/completions", json=body(prompt)) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer["choices"][0]["token_ids"]


async def stream(http: aiohttp.ClientSession, prompt: str, leave_after: int | None) -> list[int]:
    """The tokens of a streamed completion. The client hangs up after `leave_after` of them."""
    tokens: list[int] = []
    async with http.post("/v1/completions", json=body(prompt, stream=True)) as response:
        assert response.status == 200
        async for line in response.content:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            tokens += json.loads(data)["choices"][0]["token_ids"]
            if leave_after is not None and len(tokens) >= leave_after:
                response.close()
                break
    return tokens


async def metric(http: aiohttp.ClientSession, name: str) -> float:
    async with http.get("/metrics") as response:
        text = await response.text()
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def test_the_log_says_what_computes(server):
    messages = server.messages()
    assert "Attention backend LITE_ATTENTION, chosen by the environment variable VLLM_ATTENTION_BACKEND." in messages
    (line,) = [message for message in messages if message.startswith("LITE_ATTENTION ")]
    computes = (
        f"LITE_ATTENTION {lite_attention.__version__} computes attention by the CPU path: {SMALL['layers']} layers"
    )
    assert line.startswith(computes)
    assert "Unknown vLLM environment variable detected: VLLM_ATTENTION_BACKEND" not in server.output()


async def test_32_streams_of_which_some_are_cancelled(http, small_reference):
    prompts = PROMPTS * 4
    leave = [3 + i if i % 4 == 1 else None for i in range(len(prompts))]
    streams = await asyncio.gather(*(stream(http, *each) for each in zip(prompts, leave, strict=True)))
    for i, (tokens, after) in enumerate(zip(streams, leave, strict=True)):
        (expected,) = small_reference[0][i % len(PROMPTS)]
        if after is None:
            assert tokens == expected
        else:
            assert len(tokens) >= after
            assert tokens == expected[: len(tokens)]
    for _ in range(100):  # the engine hears of a client that hung up with its next step
        if await metric(http, "vllm:num_requests_running") == 0:
            break
        await asyncio.sleep(0.1)
    assert await metric(http, "vllm:num_requests_running") == 0
    assert await metric(http, "vllm:kv_cache_usage_perc") == 0
    assert await metric(http, "vllm:num_preemptions_total") > 0
    assert await metric(http, "vllm:prefix_cache_hits_total") > 0


async def test_parallel_sampling(http):
    request = body(PROMPTS[2], n=3, temperature=0.9, seed=7, max_tokens=16)
    async with http.post("/v1/completions", json=request) as response:
        choices = (await response.json())["choices"]
    assert len({tuple(choice["token_ids"]) for choice in choices}) == 3


@pytest.mark.parametrize(
    ("data", "statuses", "message"),
    [
        (json.dumps(body(SHARED * 12)), {400}, "512"),
        ('{"model": "small", "prompt": "The', {400, 422}, "JSON"),
        (json.dumps(body("Hello", max_tokens=-3)), {400, 422}, "max_tokens"),
        (json.dumps(body("Hello", model="no-such-model")), {404}, "no-such-model"),
    ],
    ids=["oversize prompt", "malformed JSON", "negative max_tokens", "unknown model"],
)
async def test_bad_requests_get_a_clear_error_and_the_server_lives_on(http, small_reference, data, statuses, message):
    headers = {"Content-Type": "application/json"}
    good, bad = await asyncio.gather(
        complete(http, PROMPTS[1]), http.post("/v1/completions", data=data, headers=headers), return_exceptions=True
    )
    assert good == small_reference[0][1][0]
    async with bad:
        assert bad.status in statuses
        assert message in await bad.text()
    assert await complete(http, PROMPTS[0]) == small_reference[0][0][0]
