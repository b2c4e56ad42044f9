"""What a soak test checks: each check is content with a sound trace, and finds what is wrong with a broken one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import soak_answers
import soak_counters
import soak_memory
import soak_run
from soak_canary import Canaries
from soak_client import Answer, Client
from soak_counters import Scrape, Sent
from soak_load import Load, Request

BODY = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def scrape(**changes: float) -> Scrape:
    return Scrape.of(scrape_text(**changes))


def scrape_text(**changes: float) -> str:
    """Of a server that has given 100 tokens in 10 sequences."""
    values = {
        "generation_tokens": 100,
        "firsts": 10,
        "preemptions": 0,
        "rows": 90,
        "read": 500,
        "visible": 1000,
        "left_out": 4,
        "decisions": 100,
        "sketch_bytes": 4096,
        "running": 0,
    } | changes
    return (
        "# TYPE vllm:generation_tokens_total counter\n"
        'vllm:generation_tokens_total{{engine="0"}} {generation_tokens}\n'
        "# TYPE vllm:num_preemptions_total counter\n"
        'vllm:num_preemptions_total{{engine="0"}} {preemptions}\n'
        "# TYPE vllm:time_to_first_token_seconds histogram\n"
        'vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf"}} {firsts}\n'
        'vllm:time_to_first_token_seconds_count{{engine="0"}} {firsts}\n'
        'vllm:time_to_first_token_seconds_sum{{engine="0"}} 3.5\n'
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{{engine="0"}} {running}\n'
        "# TYPE lite_attention:pages_read_total counter\n"
        'lite_attention:pages_read_total{{layers="first"}} {read}\n'
        "# TYPE lite_attention:pages_visible_total counter\n"
        'lite_attention:pages_visible_total{{layers="first"}} {visible}\n'
        "# TYPE lite_attention:left_out_mass_total counter\n"
        'lite_attention:left_out_mass_total{{layers="first"}} {left_out}\n'
        "# TYPE lite_attention:decisions_total counter\n"
        'lite_attention:decisions_total{{layers="first"}} {decisions}\n'
        "# TYPE lite_attention:decode_rows_total counter\n"
        'lite_attention:decode_rows_total{{attention="listed"}} {rows}\n'
        'lite_attention:decode_rows_total{{attention="dense"}} 0\n'
        "# TYPE lite_attention:sketch_bytes gauge\n"
        "lite_attention:sketch_bytes {sketch_bytes}\n".format(**values)
    )


NONE = {"generation_tokens": 0, "firsts": 0, "rows": 0, "read": 0, "visible": 0, "left_out": 0, "decisions": 0}
SENT = Sent(tokens=100, unread=0, sequences=10, cut=0)


def one(faults: list[str]) -> str:
    assert len(faults) == 1, faults
    return faults[0]


def test_counters_that_rise():
    assert not soak_counters.between(scrape(**NONE), scrape())
    assert not soak_counters.between(scrape(), scrape())
    assert not soak_counters.between(scrape(read=1001), scrape(read=1001, visible=1002))  # written one after the other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 89}, 'decode_rows_total{attention="listed"} fell from 90 to 89'),
        ({"generation_tokens": 0}, 'generation_tokens_total{engine="0"} fell from 100 to 0'),
        ({"left_out": float("nan")}, 'left_out_mass_total{layers="first"} fell from 4 to nan'),
        ({"visible": 1000, "read": 1001}, None),
        ({"sketch_bytes": 8192}, "sketch_bytes changed from 4096 to 8192"),
    ],
)
def test_counters_that_fall(changes, message):
    found = soak_counters.between(scrape(), scrape(**changes))
    assert (message in one(found)) if message else not found


def test_more_pages_read_than_there_are():
    assert "was 1001, of 1000 pages" in one(soak_counters.between(scrape(read=1001), scrape(read=1001)))


def test_a_counter_that_goes():
    now = scrape()
    del now.rising['lite_attention:left_out_mass_total{layers="first"}']
    assert "is gone" in one(soak_counters.between(scrape(), now))


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        ({}, {}),
        ({"preemptions": 3, "rows": 87}, {}),  # their next tokens came from prefills
        ({"rows": 92}, {}),  # two prompts had a last part of one token
        ({"rows": 105}, {"cut": 1}),  # steps until the engine heard that a client had left
        ({}, {"tokens": 80, "unread": 30, "cut": 1}),
    ],
)
def test_counts_that_agree(changes, sent):
    assert not soak_counters.at_rest(scrape(**NONE), scrape(**changes), replace(SENT, **sent), eps=0.1)


@pytest.mark.parametrize(
    ("changes", "sent", "message"),
    [
        ({"rows": 89}, {}, "decode_rows_total rose by 89 where 90 to 92.5 were due"),
        ({"rows": 93}, {}, "decode_rows_total rose by 93"),
        ({"rows": 180}, {}, "decode_rows_total rose by 180"),  # both of two GPUs count
        ({"rows": 86, "preemptions": 3}, {}, "decode_rows_total rose by 86"),
        ({"rows": 110}, {"cut": 1}, "decode_rows_total rose by 110"),
        ({}, {"tokens": 101}, "generation_tokens_total rose by 100; clients had 101"),
        ({}, {"tokens": 80, "unread": 10}, "generation_tokens_total rose by 100; clients had 80"),
        ({"read": 1001}, {}, "is 1001, of 1000 pages_visible_total"),
        ({"read": 0}, {}, "is 0, of 1000 pages_visible_total"),
        ({"left_out": 11}, {}, "left_out_mass_total rose by 11 in 100 decisions"),
        ({"running": 1}, {}, "vllm:num_requests_running is 1 with no request"),
        ({"sketch_bytes": 0}, {}, "the server does not decode from lists"),
    ],
)
def test_counts_that_do_not_agree(changes, sent, message):
    found = soak_counters.at_rest(scrape(**NONE), scrape(**changes), replace(SENT, **sent), eps=0.1)
    assert message in one(found)


def best(*leads: float) -> list[dict[str, float]]:
    """Logprobs of three tokens at each position, with the lead of token 7 over token 8."""
    return [{"token_id:7": -1.0, "token_id:8": -1.0 - lead, "token_id:9": -4.0} for lead in leads]


def test_a_canary_that_stays():
    canaries = Canaries([([7, 7, 7], best(2, 1, 2))])
    assert canaries.unused()
    assert canaries.compare(0, [7, 7, 7], best(2, 1, 2), preempted=False) is None
    assert canaries.found == {"same": 1} and canaries.rounding == 0
    assert canaries.unused() is None


def test_a_canary_that_changes():
    canaries = Canaries([([7, 7, 7], best(2, 1, 2))])
    assert "token 1 is 8, at first 7" in canaries.compare(0, [7, 8, 7], best(2, -1, 2), preempted=False)
    assert "2 tokens, 3 at first" in canaries.compare(0, [7, 7], best(2, 1), preempted=False)
    unknown = [best(2)[0], {"token_id:5": -0.1, "token_id:7": -3.0}, best(2)[0]]
    assert "token 1 is 5" in canaries.compare(0, [7, 5, 7], unknown, preempted=False)


def test_a_change_beside_a_preemption_is_excused_and_is_no_comparison():
    canaries = Canaries([([7, 7, 7], best(2, 1, 2))])
    assert canaries.compare(0, [7, 8, 8], best(2, -1, 2), preempted=True) is None
    assert canaries.compare(0, [7, 7, 7], best(2, 1, 2), preempted=True) is None
    assert "no canary was compared" in canaries.unused()


def test_rounding_excuses_a_tie_and_no_more():
    canaries = Canaries([([7, 7, 7], best(2, 0.01, 2)), ([7, 7, 7], best(2, 1, 2))])
    assert canaries.compare(0, [7, 7, 7], best(2.02, 0.01, 2.02), preempted=False) is None
    assert 0.005 < canaries.rounding < 0.02
    assert canaries.compare(0, [7, 8, 8], best(2, -0.01, 2), preempted=False) is None
    assert canaries.found["another answer, by rounding"] == 1
    assert "token 1 is 8" in canaries.compare(1, [7, 8, 8], best(2, -0.01, 2), preempted=False)


def samples(*mib: float) -> list[tuple[float, float]]:
    return [(4.0 * i, each) for i, each in enumerate(mib)]


def test_memory_that_stays_or_grows_at_first():
    noisy = samples(*(100 + i % 3 for i in range(100)))
    warming = samples(*range(0, 300, 10), *[300] * 70)
    peak = samples(*[100] * 90, *[900] * 5, *[100] * 5)
    for each in (noisy, warming, peak):
        assert soak_memory.fault("memory", each, warm_s=120, bound=20) is None
    assert soak_memory.drift(samples(*[100] * 35), warm_s=120) is None  # too short to tell


def test_memory_that_leaks():
    leaking = samples(*(100 + i for i in range(100)))
    assert "memory grew by 47 MiB" in soak_memory.fault("memory", leaking, warm_s=120, bound=20)


def test_memory_of_this_process():
    assert soak_memory.host_mib(os.getpid()) > 10
    assert soak_memory.host_mib(2**22 + 1) == 0  # no process has that number


def test_memory_on_a_gpu_that_others_use():
    listed = "11, 4000\n12, 300\n13, 70000\n14, [N/A]\n"
    assert soak_memory.used_by({11, 12, 14}, listed) == 4300
    assert soak_memory.used_by({10}, listed) is None
    assert soak_memory.used_by({14}, listed) is None
    assert soak_memory.used_by({10}, "") is None


def answer(**changes: object) -> Answer:
    values = {"ended": "finished", "status": 200, "tokens": [[5, 6, 7, 8]], "reasons": ["length"], "generated": 4}
    return Answer(1, **values | changes)


LEAVES = {"leave_after": 2}
REFUSED = {"statuses": (400, 404)}


@pytest.mark.parametrize(
    ("request_changes", "answer_changes", "message"),
    [
        ({}, {}, None),
        (REFUSED, {"ended": "refused", "status": 404}, None),
        (LEAVES, {"ended": "left"}, None),
        (LEAVES, {}, None),
        ({}, {"ended": "refused", "status": 500, "error": "no luck"}, "HTTP 500 where 200 was due: no luck"),
        (REFUSED, {}, "HTTP 200 where 400 or 404 was due"),
        (REFUSED, {"ended": "refused", "status": 500}, "HTTP 500 where 400 or 404 was due"),
        ({}, {"ended": "late", "seconds": 300}, "no end after 300 s"),
        (LEAVES, {"ended": "late"}, "no end"),
        ({}, {"ended": "broken", "error": "reset"}, "broken off: reset"),
        ({}, {"ended": "broken", "status": None, "error": "no connection"}, "broken off: no connection"),
        ({}, {"tokens": [[5, 6, 7]], "generated": 3}, "3 tokens where 4 were due"),
        ({}, {"generated": 5}, "4 tokens came, 5 were generated"),
        ({}, {"reasons": ["stop"]}, "finished for the reason 'stop'"),
        ({}, {"reasons": [None]}, "finished for the reason None"),
        ({"body": BODY | {"stop": ["x"]}}, {"reasons": ["stop"], "tokens": [[5]], "generated": 1}, None),
        ({"body": BODY | {"stop": ["x"]}}, {"reasons": ["abort"]}, "finished for the reason 'abort'"),
    ],
)
def test_answers(request_changes, answer_changes, message):
    found = soak_answers.fault(Request(**{"kind": "plain", "body": BODY} | request_changes), answer(**answer_changes))
    assert found is None if message is None else message in found


def test_the_load_has_every_kind_and_fits():
    load = Load(range(5000), "model", 512, longest=0.8, seeds=True, seed=1)
    drawn = [load.draw() for _ in range(1000)]
    assert {each.kind for each in drawn} == {"plain", "parallel", "stop", "leaves", "refused"}
    sound = [each.body for each in drawn if each.kind != "refused"]
    assert all(body["prompt"] and len(body["prompt"]) + body["max_tokens"] <= 512 for body in sound)
    assert all(body["temperature"] > 0 for body in sound if body.get("n", 1) > 1)
    assert all(("seed" in body) == (body["temperature"] > 0) for body in sound)
    again = Load(range(5000), "model", 512, longest=0.8, seeds=True, seed=1)
    assert [again.draw() for _ in range(1000)] == drawn
    unseeded = Load(range(5000), "model", 512, longest=0.8, seeds=False, seed=1)
    assert not any("seed" in unseeded.draw().body for _ in range(100))
    assert all(len(each.body["prompt"]) + each.body["max_tokens"] <= 512 for each in load.canaries())


class FakeServer:
    """Answers as vLLM does, with all tokens that are asked for; `wrong` is what is amiss after a few answers."""

    def __init__(self, wrong: str | None) -> None:
        self.wrong, self.completions = wrong, 0
        self.tokens = self.firsts = 0

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "model", "max_model_len": 512}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": [*(await request.text()).encode()]})

    async def metrics(self, _: web.Request) -> web.Response:
        rows = self.tokens - self.firsts
        fallen = 10 if self.wrong == "counter" and self.completions > 8 else 0
        values = {"rows": max(0, rows - fallen), "read": rows + 1, "visible": 2 * rows + 1}
        running = 1 if self.wrong == "running" and self.completions > 8 else 0
        sketch_bytes = 0 if self.wrong == "no lists" else 4096
        return web.Response(
            text=scrape_text(
                generation_tokens=self.tokens,
                firsts=self.firsts,
                left_out=0,
                decisions=rows,
                running=running,
                sketch_bytes=sketch_bytes,
                **values,
            )
        )

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["model"] != "model" or body["max_tokens"] < 1 or len(body["prompt"]) > 512:
            return web.Response(status=400, text="no")
        self.completions += 1
        late = self.completions > 4
        if late and self.wrong == "error":
            return web.Response(status=500, text="the engine has ended")
        if late and self.wrong == "hangs":
            await asyncio.sleep(3)
        n, most = body.get("n", 1), body["max_tokens"]
        tokens = [8 if late and self.wrong == "canary" and "logprobs" in body else 7] * most
        self.tokens += n * most
        self.firsts += n
        choices = [
            {
                "index": i,
                "token_ids": tokens,
                "finish_reason": "length",
                "logprobs": {"top_logprobs": best(*[2] * most)},
            }
            for i in range(n)
        ]
        answer = {"choices": choices, "usage": {"completion_tokens": n * most}}
        if not body.get("stream"):
            return web.json_response(answer)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n".encode())
        return response


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, None),
        ("error", "HTTP 500 where 200 was due: the engine has ended"),
        ("hangs", "no end after 1 s"),
        ("canary", "is 8, at first 7"),
        ("counter", "decode_rows_total"),
        ("running", "vllm:num_requests_running is 1"),
        ("no lists", "does not decode from lists"),
    ],
)
async def test_a_soak_of_a_sound_and_of_a_broken_server(monkeypatch, wrong, message):
    for name, value in {"SCRAPE_S": 0.2, "SETTLE_S": 0.05, "CANARY_S": 0.1, "CORPUS": 2000}.items():
        monkeypatch.setattr(soak_run, name, value)
    server, app = FakeServer(wrong), web.Application()
    app.add_routes([web.get("/v1/models", server.models), web.get("/metrics", server.metrics)])
    app.add_routes([web.post("/tokenize", server.tokenize), web.post("/v1/completions", server.complete)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    plan = soak_run.Plan(
        seconds=1,
        rate=60,
        in_flight=8,
        longest=0.8,
        patience=1,
        warm_s=0.5,
        host_bound=100,
        gpu_bound=1e6,
        eps=0.1,
        pid=os.getpid(),
        preempts=False,
        seeds=True,
        seed=0,
    )
    alarms = []
    try:
        async with Client(url, plan.patience) as client:
            result = await soak_run.Soak(client, plan, lambda *_: None, alarms.append).run()
    finally:
        await runner.cleanup()
    assert alarms == [*result["faults"]]
    assert result["requests"]["plain"] > 3
    if message is None:
        assert not alarms
        assert result["canaries"]["same"] > 1
        assert len(result["host_mib"]) > 2
    else:
        assert any(message in each for each in alarms), alarms
