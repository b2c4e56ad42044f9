"""Runs vLLM's offline engine with lists, and reports what it generated and what it counted.

Input as `probe_engine.py`; a round may also be {"poison": true}, which overwrites every sketch of the KV cache, or have
{"abort": {"after": steps, "requests": [their places]}}. Output: the rounds that generated, the engine's counters,
`lite_attention.stats()` or None, and the number of pages.
"""

import dataclasses
import json
import sys
import time

from probe_engine import as_prompt, best, generate
from processes import report


def poison(worker) -> int:
    """In a worker: makes every page look as if it mattered more than any other. Returns how many sketches there are."""
    from vllm_plugin import sketches

    count = 0
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        if layer.impl.listing is not None and layer.impl.listing.tally is not None:
            view = sketches.view(layer.kv_cache, layer.head_size)
            view.random_(0, 256)
            view[..., :16] = 0x3F  # offsets and steps of 0.75, so that means are up to 192
            count += view.shape[0] * view.shape[1]
    return count


def generate_with_aborts(llm, prompts: list, sampling: dict, abort: dict) -> dict:
    """As `generate`, with requests that leave after some steps: nothing is told of those."""
    from vllm import SamplingParams

    engine, done, steps = llm.llm_engine, {}, 0
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), as_prompt(prompt), SamplingParams(**sampling))
    while engine.has_unfinished_requests():
        if steps == abort["after"]:
            engine.abort_request([str(i) for i in abort["requests"]])
        done |= {int(output.request_id): output for output in engine.step() if output.finished}
        steps += 1
    stayed = [done[i].outputs for i in range(len(prompts)) if i not in abort["requests"]]
    return {
        "tokens": [[list(sample.token_ids) for sample in samples] for samples in stayed],
        "best": [[best(sample.logprobs) for sample in samples] for samples in stayed],
    }


def counted() -> dict | None:
    """`lite_attention.stats()`, once they stand still."""
    import lite_attention
    from vllm_plugin.metrics import PERIOD

    time.sleep(PERIOD + 0.5)
    try:
        return dataclasses.asdict(lite_attention.stats())
    except RuntimeError:
        return None


if __name__ == "__main__":
    from vllm import LLM

    request = json.load(sys.stdin)
    llm = LLM(disable_log_stats=False, **request["engine"])
    rounds = []
    for each in request["rounds"]:
        if each.get("poison"):
            assert all(llm.collective_rpc(poison))
        elif "abort" in each:
            rounds.append(generate_with_aborts(llm, each["prompts"], each["sampling"], each["abort"]))
        else:
            rounds.append(generate(llm, each["prompts"], each["sampling"]))
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    pages = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    report({"rounds": rounds, "counters": counters, "stats": counted(), "pages": pages})
