"""The client of a soak test: one request at a time to a vLLM server, told as an `Answer` whatever becomes of it."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import aiohttp
from soak_load import Request


@dataclass
class Answer:
    """What came of a request.

    Attributes:
        ended: "finished", "left" by this client, "refused" by the server, "broken", or "late" where it had no end.
        error: what the server or the connection said.
        tokens, best, reasons: of each sequence, as far as they came: its tokens, the logprobs of the best few at each,
            and why it finished.
        generated: how many tokens the server says it generated in all; of a stream that was left, how many came.
    """

    sequences: int
    ended: str = "broken"
    status: int | None = None
    error: str = ""
    tokens: list[list[int]] = field(default_factory=list)
    best: list[list[dict[str, float]]] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    generated: int = 0
    seconds: float = 0.0
    first_s: float | None = None

    def __post_init__(self) -> None:
        self.tokens = self.tokens or [[] for _ in range(self.sequences)]
        self.best = self.best or [[] for _ in range(self.sequences)]
        self.reasons = self.reasons or [None] * self.sequences


class Client:
    """Talks to a server; used as an asynchronous context manager."""

    def __init__(self, url: str, patience: float) -> None:
        """`patience`: seconds after which a request is taken to have no end."""
        self.url, self.patience = url, patience

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0)
        self._http = aiohttp.ClientSession(self.url, connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def model(self) -> tuple[str, int]:
        """The name of the model that is served, and its context."""
        async with self._http.get("/v1/models", raise_for_status=True) as response:
            first = (await response.json())["data"][0]
        return first["id"], first["max_model_len"]

    async def tokenize(self, model: str, text: str) -> list[int]:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        async with self._http.post("/tokenize", json=body, raise_for_status=True) as response:
            return (await response.json())["tokens"]

    async def metrics(self) -> str:
        async with asyncio.timeout(30), self._http.get("/metrics", raise_for_status=True) as response:
            return await response.text()

    async def send(self, request: Request) -> Answer:
        answer, start = Answer(request.sequences), time.monotonic()
        limit = self.patience if request.leave_after_s is None else min(request.leave_after_s, self.patience)
        try:
            async with asyncio.timeout(limit), self._http.post("/v1/completions", json=request.body) as response:
                answer.status = response.status
                if response.status != 200:
                    answer.ended, answer.error = "refused", (await response.text())[:300]
                elif request.body.get("stream"):
                    await self._read_stream(response, request, answer, start)
                else:
                    self._take(await response.json(), answer)
                    answer.ended = "finished"
        except TimeoutError:
            answer.ended = "late" if request.leave_after_s is None else "left"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.seconds = time.monotonic() - start
        return answer

    async def _read_stream(
        self, response: aiohttp.ClientResponse, request: Request, answer: Answer, start: float
    ) -> None:
        async for line in response.content:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                answer.ended = "finished"
                return
            if not data:
                continue
            self._take(json.loads(data), answer)
            if answer.first_s is None and any(answer.tokens):
                answer.first_s = time.monotonic() - start
            if request.leave_after is not None and sum(map(len, answer.tokens)) >= request.leave_after:
                answer.ended = "left"
                response.close()
                return
        answer.error = "the stream ended without its last line"

    @staticmethod
    def _take(data: dict, answer: Answer) -> None:
        if "error" in data:
            raise ValueError(f"the server broke off: {data['error']}")
        for choice in data["choices"]:
            at = choice["index"]
            answer.tokens[at] += choice.get("token_ids") or []
            answer.best[at] += (choice.get("logprobs") or {}).get("top_logprobs") or []
            answer.reasons[at] = choice.get("finish_reason") or answer.reasons[at]
        usage = data.get("usage")
        answer.generated = usage["completion_tokens"] if usage else sum(map(len, answer.tokens))
