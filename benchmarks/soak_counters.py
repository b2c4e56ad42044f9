"""What `/metrics` may say in a soak test: counters that only rise, and that agree with each other and with the load."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

RISING = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
LATE_ROWS = 16  # steps that the engine may still take for a request whose client has left, or that met a stop string
SINGLE = 0.25  # of the prefills; one may end with a step of a single token, which counts as a decode step


@dataclass(frozen=True)
class Scrape:
    """Values of a scrape by name and labels, `name{label="value",...}`: those that never fall, and the others."""

    rising: dict[str, float]
    others: dict[str, float]

    @classmethod
    def of(cls, text: str) -> Scrape:
        rising, others = {}, {}
        for family in text_string_to_metric_families(text):
            for name, labels, value, *_ in family.samples:
                key = name + "{" + ",".join(f'{label}="{labels[label]}"' for label in sorted(labels)) + "}"
                (rising if name.endswith(RISING.get(family.type, "-")) else others)[key] = value
        return cls(rising, others)

    def total(self, name: str) -> float:
        """Sum over all labels; 0 where there is none of that name."""
        values = self.rising | self.others
        return sum(value for key, value in values.items() if key.partition("{")[0] == name)

    def by_labels(self, name: str) -> dict[str, float]:
        return {key.removeprefix(name): value for key, value in self.rising.items() if key.partition("{")[0] == name}


@dataclass(frozen=True)
class Sent:
    """What clients know of the load between two scrapes.

    Attributes:
        tokens: that came, by the server's own count where a request finished.
        unread: the most that requests whose clients left may have been given besides.
        sequences: answers that were asked for.
        cut: those of them that a client left, or that stopped before their last token.
    """

    tokens: int
    unread: int
    sequences: int
    cut: int


def between(before: Scrape, now: Scrape) -> list[str]:
    """What is wrong with a scrape after another one, both while the server works."""
    faults = [
        f"{key} fell from {value:g} to {now.rising[key]:g}" if key in now.rising else f"{key} is gone from /metrics"
        for key, value in before.rising.items()
        if not now.rising.get(key, float("-inf")) >= value  # nor NaN
    ]
    visible = now.by_labels("lite_attention:pages_visible_total")
    for labels, read in before.by_labels("lite_attention:pages_read_total").items():  # one is written after the other
        if read > visible.get(labels, 0):
            faults.append(f"pages_read_total{labels} was {read:g}, of {visible.get(labels, 0):g} pages_visible_total")
    sketches = [each.total("lite_attention:sketch_bytes") for each in (before, now)]
    if sketches[0] != sketches[1]:
        faults.append(f"lite_attention:sketch_bytes changed from {sketches[0]:g} to {sketches[1]:g}")
    return faults


def at_rest(first: Scrape, last: Scrape, sent: Sent, eps: float | None) -> list[str]:
    """What is wrong with all that was counted between two scrapes, both with no request in the server."""
    faults = []

    def risen(name: str) -> float:
        return last.total(name) - first.total(name)

    if not last.total("lite_attention:sketch_bytes"):
        return ["lite_attention:sketch_bytes is not on /metrics: the server does not decode from lists"]
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        if left := last.total(name):
            faults.append(f"{name} is {left:g} with no request in the server")
    generated = risen("vllm:generation_tokens_total")
    if not sent.tokens <= generated <= sent.tokens + sent.unread:
        faults.append(
            f"vllm:generation_tokens_total rose by {generated:g}; clients had {sent.tokens} tokens, and may have left "
            f"{sent.unread} more behind"
        )
    firsts = risen("vllm:time_to_first_token_seconds_count")
    preemptions = risen("vllm:num_preemptions_total")
    rows = risen("lite_attention:decode_rows_total")
    low = generated - firsts - preemptions  # a preempted request gets its next token from a prefill
    high = generated - firsts + preemptions + LATE_ROWS * sent.cut + SINGLE * (sent.sequences + preemptions)
    if not risen("vllm:spec_decode_num_drafts_total") and not low <= rows <= high:
        faults.append(
            f"lite_attention:decode_rows_total rose by {rows:g} where {low:g} to {high:g} were due: {generated:g} "
            f"tokens, {firsts:g} of them first ones, {preemptions:g} preemptions, {sent.cut} sequences cut short"
        )
    for labels, visible in last.by_labels("lite_attention:pages_visible_total").items():
        read = last.by_labels("lite_attention:pages_read_total").get(labels, 0)
        if not 0 < read <= visible:
            faults.append(f"pages_read_total{labels} is {read:g}, of {visible:g} pages_visible_total")
    out, decisions = (risen(f"lite_attention:{name}_total") for name in ("left_out_mass", "decisions"))
    if eps is not None and out > eps * decisions:
        faults.append(f"left_out_mass_total rose by {out:g} in {decisions:g} decisions, more than eps {eps:g} of each")
    return faults
