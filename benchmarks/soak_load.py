"""What a soak test sends: prompts of all lengths, shared beginnings, samples, stop strings, clients that leave."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

BURST, CALM, CALM_RATE = 20.0, 10.0, 0.15  # seconds of each, in turn, and the share of the rate while it is calm
STOPS = ["\n\n", "return", "the", "):"]  # strings that code and prose come to soon


@dataclass(frozen=True)
class Request:
    """One request, and what is to come of it.

    Attributes:
        kind: for the report.
        body: of `POST /v1/completions`.
        sequences: how many answers it asks for.
        leave_after: the client hangs up after so many tokens of a stream.
        leave_after_s: the client hangs up after so many seconds.
        statuses: what the server is to answer with.
    """

    kind: str
    body: dict
    sequences: int = 1
    leave_after: int | None = None
    leave_after_s: float | None = None
    statuses: tuple[int, ...] = (200,)

    @property
    def leaves(self) -> bool:
        return self.leave_after is not None or self.leave_after_s is not None

    @property
    def most_tokens(self) -> int:
        return self.sequences * self.body.get("max_tokens", 0)


class Load:
    """Draws requests, the same ones for the same seed."""

    def __init__(
        self, corpus: Sequence[int], model: str, context: int, *, longest: float, seeds: bool, seed: int
    ) -> None:
        """`corpus`: tokens that prompts are cut from; `longest`: the longest prompts, as a share of `context`;
        `seeds`: whether requests that are sampled have some; `seed`: of the load itself.
        """
        self.corpus, self.model, self.context, self.seeds = corpus, model, context, seeds
        self.random = random.Random(seed)
        self.most_new = max(16, min(128, context // 8))
        self.long = range(context // 4, min(int(longest * context), context - self.most_new))
        self.short = range(4, max(8, context // 16))
        shared = context // 6
        self.prefixes = [self._text(shared - shared % 16 + i) for i in range(4)]  # some end with their page, others not

    def wait(self, elapsed: float, rate: float) -> float:
        """Seconds until the next request comes: as a Poisson process, with bursts."""
        calm = elapsed % (BURST + CALM) >= BURST
        return self.random.expovariate(rate * (CALM_RATE if calm else 1))

    def canaries(self) -> list[Request]:
        """Greedy prompts of each length, which are to get the same answer whenever they come."""
        lengths = (self.short[-1], self.context // 8, self.context // 3)
        prompts = [self._text(length) for length in lengths] + [self.prefixes[1] + self._text(9)]
        new = min(32, self.most_new)
        extra = {"logprobs": 5, "return_tokens_as_token_ids": True}
        return [Request("canary", self._body(prompt, max_tokens=new, **extra)) for prompt in prompts]

    def draw(self) -> Request:
        kind = self.random.choices(["plain", "parallel", "stop", "leaves", "refused"], [55, 15, 12, 15, 3])[0]
        body = self._body(self._prompt(), max_tokens=self.random.randint(1, self.most_new))
        if self.random.random() < 0.5 or kind == "parallel":
            body |= {"temperature": self.random.choice([0.5, 0.8, 1.0]), "top_p": self.random.choice([0.9, 1.0])}
            if self.seeds:
                body["seed"] = self.random.randrange(1 << 31)
        if self.random.random() < 0.7:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return getattr(self, f"_{kind}")(body)

    def _plain(self, body: dict) -> Request:
        body["ignore_eos"] = self.random.random() < 0.7
        return Request("plain", body)

    def _parallel(self, body: dict) -> Request:
        body["n"] = self.random.randint(2, 4)
        return Request("parallel", body, sequences=body["n"])

    def _stop(self, body: dict) -> Request:
        return Request("stop", body | {"stop": self.random.sample(STOPS, 2)})

    def _leaves(self, body: dict) -> Request:
        body["max_tokens"] = self.most_new
        body["n"] = 3 if body["temperature"] and self.random.random() < 0.3 else 1
        if body.get("stream") and self.random.random() < 0.7:
            return Request("leaves", body, body["n"], leave_after=self.random.randint(1, self.most_new // 2))
        return Request("leaves", body, body["n"], leave_after_s=self.random.uniform(0, 3))

    def _refused(self, body: dict) -> Request:
        bad = self.random.choice(["oversize", "unknown model", "no tokens"])
        if bad == "oversize":
            body["prompt"] = self._text(self.context + 1)
        elif bad == "unknown model":
            body["model"] = "no-such-model"
        else:
            body["max_tokens"] = -3
        return Request("refused", body, statuses=(400, 404, 422))

    def _prompt(self) -> list[int]:
        length = self.random.choices(["short", "long", "shared"], [55, 25, 20])[0]
        if length == "shared":
            return self.random.choice(self.prefixes) + self._text(self.random.choice(self.short))
        return self._text(self.random.choice(self.short if length == "short" else self.long))

    def _text(self, length: int) -> list[int]:
        start = self.random.randrange(max(1, len(self.corpus) - length))
        text = list(self.corpus[start : start + length])
        return (text * -(-length // len(text)))[:length]

    def _body(self, prompt: list[int], **changes: object) -> dict:
        values = {"model": self.model, "prompt": prompt, "temperature": 0, "ignore_eos": True}
        return values | {"return_token_ids": True} | changes
