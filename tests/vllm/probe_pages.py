"""Runs vLLM's offline engine with lists, and reports what it generated and what it counted.

Input as `probe_engine.py`; a round may also be {"poison": true}, which overwrites every sketch of the KV cache, or
{"forget": true}, which empties the prefix cache before that, or {"dummy": true}, which has the workers run the model on
nothing, or have {"abort": {"after": steps, "requests": [their places]}}, or be {"forks": arguments of
`generate_forks`}. Output: the rounds that generated, the engine's counters, `lite_attention.stats()` or None, and the
number of pages.
"""

import dataclasses
import json
import sys
import time

from probe_engine import as_prompt, best, generate
from processes import report


def poison(worker) -> int:
    """In a worker: makes every page look as if it mattered more than any other. Returns how many sketches there are.

    Their deviation is 3156 and their means are up to 192: whatever a query is, those can't outweigh it.
    """
    from vllm_plugin import sketches

    count = 0
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        if layer.impl.listing is not None and layer.impl.listing.tally is not None:
            view = sketches.view(layer.kv_cache, layer.head_size, layer.impl.listing.settings.sketch_bits)
            view.random_(0, 256)
            view[..., :16] = 0x3F  # offset and steps of 0.75
            view[..., 12:16] = 0x45
            count += view.shape[0] * view.shape[1]
    return count


def dummy_run(worker) -> None:
    """In a worker: what vLLM's warm-up does, which it leaves out on the CPU where nothing is compiled."""
    worker.model_runner._dummy_run(16)


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


def generate_forks(llm, prompt: list[int], sampling: dict, then: dict, strangers: list) -> dict:
    """Samples of one prompt, and what follows on each: a new request, whose prompt is the first one and its answer.

    "together" has them as forks, which share pages with each other; what follows comes in one batch, with strangers.
    "alone" has each by itself, one after the other, from a KV cache that has nothing of the others; and what follows
    twice: from the pages that the answer left ("after"), and from none ("anew").
    """
    n, seed = sampling["n"], sampling["seed"]
    (answers,) = generate(llm, [prompt], sampling)["tokens"]
    forks = generate(llm, [*([*prompt, *answer] for answer in answers), *strangers], then)
    follows = [tokens for (tokens,) in forks["tokens"][:n]]
    together = {"answers": answers, "cached": forks["cached"][:n], "follows": follows}
    alone = {"answers": [], "after": [], "anew": []}

    def follow(tokens: list[int], how: dict) -> list[int]:
        return generate(llm, [tokens], how)["tokens"][0][0]

    def forget() -> None:
        assert llm.reset_prefix_cache() and all(llm.collective_rpc(poison))

    for i in range(n):
        forget()
        answer = follow(prompt, sampling | {"n": 1, "seed": seed + i})  # as vLLM counts seeds on
        alone["answers"].append(answer)
        alone["after"].append(follow([*prompt, *answer], then))
        forget()
        alone["anew"].append(follow([*prompt, *answer], then))
    return {"together": together, "alone": alone}


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
        if each.get("forget"):
            assert llm.reset_prefix_cache()
        if each.get("forget") or each.get("poison"):
            assert all(llm.collective_rpc(poison))
        elif each.get("dummy"):
            llm.collective_rpc(dummy_run)
        elif "forks" in each:
            rounds.append(generate_forks(llm, **each["forks"]))
        elif "abort" in each:
            rounds.append(generate_with_aborts(llm, each["prompts"], each["sampling"], each["abort"]))
        else:
            rounds.append(generate(llm, each["prompts"], each["sampling"]))
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    pages = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    report({"rounds": rounds, "counters": counters, "stats": counted(), "pages": pages})
