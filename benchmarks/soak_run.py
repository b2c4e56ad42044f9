"""A soak test of a running server: sends the load, checks while it runs, and when all is at rest."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import soak_answers
import soak_counters
import soak_memory
from code_prompts import sources
from soak_canary import Canaries
from soak_client import Answer, Client
from soak_counters import Scrape, Sent
from soak_load import Load, Request

SCRAPE_S = 4.0  # between two scrapes of /metrics; workers write theirs every other second
SETTLE_S = 2.5  # until they have written what they counted
CANARY_S = 3.0  # between two canaries, less where the last one took that long
MOST_FAULTS = 20  # after which it goes on no longer
CORPUS = 60_000  # tokens of text to cut prompts from, or four times the context


@dataclass(frozen=True)
class Plan:
    """How long and how hard, and what is allowed.

    Attributes:
        seconds: of load.
        rate: requests a second, on average while it is busy.
        in_flight: the most requests at a time; later ones wait.
        longest: the longest prompts, as a share of the model's context.
        patience: seconds after which a request is taken to have no end.
        warm_s: seconds after which memory is not to grow by more than `host_bound` or `gpu_bound` MiB.
        eps: the server's, where it is known.
        pid: the server, where it runs on this machine.
        preempts: whether preemptions are to happen.
        seeds: whether requests that are sampled have seeds.
        seed: of the load itself.
        shared_gpu: whether others use the GPUs, so that memory is the server's processes' alone.
    """

    seconds: float
    rate: float
    in_flight: int
    longest: float
    patience: float
    warm_s: float
    host_bound: float
    gpu_bound: float
    eps: float | None
    pid: int | None
    preempts: bool
    seeds: bool
    seed: int
    shared_gpu: bool = False


@dataclass
class Soak:
    """One soak test. `faults` has each message once, with how often it came."""

    client: Client
    plan: Plan
    show: Callable[[float, str], None]  # is called with the seconds that have passed, and what happens
    alarm: Callable[[str], None]  # is called with each new fault
    faults: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    ends: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    host: list[tuple[float, float]] = field(default_factory=list)
    gpu: list[tuple[float, float]] = field(default_factory=list)
    sent: Sent = field(default_factory=lambda: Sent(0, 0, 0, 0))

    async def run(self) -> dict:
        """Runs it, and returns what was found."""
        self._begin = time.monotonic()
        model, context = await self.client.model()
        self.show(0, "cutting prompts")
        plan, corpus = self.plan, await self._corpus(model, context)
        load = Load(corpus, model, context, longest=plan.longest, seeds=plan.seeds, seed=plan.seed)
        self.show(0, "asking the canaries alone")
        canaries = load.canaries()
        first = [await self._send(request) for request in canaries]
        if self.faults:
            return self._result({}, Canaries([]))
        compared = Canaries([(answer.tokens[0], answer.best[0]) for answer in first])
        self.sent = Sent(0, 0, 0, 0)  # counted from the scrape that follows
        start = self._last = await self._rest()
        self._begin = time.monotonic()
        await self._load(load, canaries, compared)
        if self.over:  # with faults: no need to look for more, least of all in a server that has ended
            return self._result({}, compared)
        end = await self._rest()
        self._note(soak_counters.between(self._last, end))
        self._note(soak_counters.at_rest(start, end, self.sent, self.plan.eps))
        self._note([compared.unused()])
        self._note([soak_memory.fault("the server's resident memory", self.host, plan.warm_s, plan.host_bound)])
        self._note([soak_memory.fault("GPU memory", self.gpu, plan.warm_s, plan.gpu_bound)])
        if plan.shared_gpu and not self.gpu:
            self._note(["nvidia-smi lists none of the server's processes"])
        counted = self._counted(start, end)
        if plan.preempts and not counted["vllm:num_preemptions_total"]:
            self._note(["no request was preempted: needs fewer pages, a higher rate or a longer run"])
        return self._result(counted, compared)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    @property
    def over(self) -> bool:
        """Whether so much is wrong that it ends early."""
        return len(self.faults) >= MOST_FAULTS

    async def _corpus(self, model: str, context: int) -> list[int]:
        found: list[int] = []
        for text in sources():
            for at in range(0, len(text), context):
                found += await self.client.tokenize(model, text[at : at + context])
            if len(found) >= max(CORPUS, 4 * context):
                break
        return found

    async def _load(self, load: Load, canaries: list[Request], compared: Canaries) -> None:
        """Sends requests until the time is over, and waits for those under way."""
        running: set[asyncio.Task] = set()
        beside = [asyncio.create_task(self._watch(running, compared))]
        birds = asyncio.create_task(self._sing(canaries, compared))
        while (elapsed := self.elapsed) < self.plan.seconds and not self.over:
            await asyncio.sleep(min(load.wait(elapsed, self.plan.rate), self.plan.seconds - elapsed))
            if len(running) >= self.plan.in_flight:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.create_task(self._send(load.draw()))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(birds, *running)
        for task in beside:
            task.cancel()
        for result in await asyncio.gather(*beside, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def _send(self, request: Request) -> Answer:
        answer = await self.client.send(request)
        self._note([soak_answers.fault(request, answer)])
        self.kinds[request.kind] += 1
        self.ends[answer.ended] += 1
        if answer.ended == "finished":
            self.seconds.append(answer.seconds)
        if answer.first_s is not None:
            self.firsts.append(answer.first_s)
        if answer.ended != "refused":
            self._count(request, answer)
        return answer

    def _count(self, request: Request, answer: Answer) -> None:
        finished = answer.ended == "finished"
        self.sent = Sent(
            self.sent.tokens + answer.generated,
            self.sent.unread + (0 if finished else request.most_tokens - answer.generated),
            self.sent.sequences + request.sequences,
            self.sent.cut + (answer.reasons.count("stop") if finished else request.sequences),
        )

    async def _sing(self, canaries: list[Request], compared: Canaries) -> None:
        """Sends one canary after the other, until the time is over."""
        at = 0
        while self.elapsed < self.plan.seconds and not self.over:
            due = self.elapsed + CANARY_S
            before = await self._preemptions()
            answer = await self._send(canaries[at])
            if answer.ended == "finished":
                preempted = await self._preemptions() != before
                self._note([compared.compare(at, answer.tokens[0], answer.best[0], preempted)])
            at = (at + 1) % len(canaries)
            await asyncio.sleep(max(0, due - self.elapsed))

    async def _preemptions(self) -> float | None:
        scrape = await self._scrape()
        return scrape and scrape.total("vllm:num_preemptions_total")

    async def _watch(self, running: set, compared: Canaries) -> None:
        """Scrapes and weighs the server, and tells how things are."""
        while True:
            if scrape := await self._scrape():
                self._note(soak_counters.between(self._last, scrape))
                self._last = scrape
            memory = await asyncio.to_thread(self._weigh)
            tokens, done = self.sent.tokens, sum(self.kinds.values())
            self.show(
                self.elapsed,
                f"{done} requests done, {len(running)} under way, {tokens / self.elapsed:.0f} tokens/s, "
                f"{self._last.total('vllm:num_preemptions_total'):.0f} preemptions, "
                f"canaries {sum(compared.found.values())}{memory}, {len(self.faults)} faults",
            )
            await asyncio.sleep(SCRAPE_S)

    def _weigh(self) -> str:
        told = ""
        if self.plan.pid is not None:
            self.host.append((self.elapsed, soak_memory.host_mib(self.plan.pid)))
            told += f", {self.host[-1][1]:.0f} MiB"
        if (gpu := soak_memory.gpu_mib(self.plan.pid if self.plan.shared_gpu else None)) is not None:
            self.gpu.append((self.elapsed, gpu))
            told += f", GPU {gpu:.0f} MiB"
        return told

    async def _scrape(self) -> Scrape | None:
        try:
            return Scrape.of(await self.client.metrics())
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            self._note([f"GET /metrics: {type(error).__name__} {error}"])
            return None

    async def _rest(self) -> Scrape:
        """A scrape when no request is in the server, or else when patience is at its end."""
        deadline = time.monotonic() + self.plan.patience
        while time.monotonic() < deadline:
            scrape = await self._scrape()
            if scrape and not any(
                scrape.total(f"vllm:{name}")
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            ):
                break
            self.show(self.elapsed, "waiting until no request is in the server")
            await asyncio.sleep(0.5)
        await asyncio.sleep(SETTLE_S)
        return await self._scrape() or Scrape({}, {})

    def _note(self, faults: list[str | None]) -> None:
        for fault in filter(None, faults):
            if fault in self.faults:
                self.faults[fault] += 1
            elif not self.over:
                self.faults[fault] = 1
                self.alarm(fault)

    @staticmethod
    def _counted(start: Scrape, end: Scrape) -> dict[str, float]:
        names = ["vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:num_preemptions_total"]
        names += ["vllm:time_to_first_token_seconds_count", "vllm:prefix_cache_hits_total"]
        names += [f"lite_attention:{name}_total" for name in ("pages_read", "pages_visible", "left_out_mass")]
        names += [f"lite_attention:{name}_total" for name in ("decisions", "decode_rows")]
        found = {name: end.total(name) - start.total(name) for name in names}
        for labels, value in end.by_labels("lite_attention:decode_rows_total").items():
            found[f"lite_attention:decode_rows_total{labels}"] = value - start.rising.get(
                f"lite_attention:decode_rows_total{labels}", 0
            )
        return found | {"lite_attention:sketch_bytes": end.total("lite_attention:sketch_bytes")}

    def _result(self, counted: dict, compared: Canaries) -> dict:
        return {
            "seconds": self.elapsed,
            "requests": dict(self.kinds),
            "ends": dict(self.ends),
            "sent": vars(self.sent),
            "seconds_to_end": _spread(self.seconds),
            "seconds_to_first_token": _spread(self.firsts),
            "canaries": dict(compared.found) | {"rounding": compared.rounding},
            "counted": counted,
            "host_mib": self.host,
            "gpu_mib": self.gpu,
            "host_drift_mib": soak_memory.drift(self.host, self.plan.warm_s),
            "gpu_drift_mib": soak_memory.drift(self.gpu, self.plan.warm_s),
            "faults": dict(self.faults),
        }


def _spread(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"median": cuts[49], "p99": cuts[98], "most": max(values)}
