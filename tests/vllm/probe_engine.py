"""Runs vLLM's offline engine once and reports what it generated.

Input: {"engine": arguments of LLM(), "rounds": [{"prompts", "sampling"}, ...]}. Output: the tokens of every sample of
every prompt in each round, with the logprobs that were asked for; how many prompt tokens came from the prefix cache;
and the engine's counters.
"""

import json
import sys

from processes import report


def best(logprobs) -> list[dict]:
    """For each position the tokens that were weighed and their values, where the sampling asks for logprobs."""
    return [{token: entry.logprob for token, entry in position.items()} for position in logprobs or ()]


def as_prompt(prompt: str | list[int]) -> str | dict:
    return {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt


def generate(llm, prompts: list, sampling: dict) -> dict:
    from vllm import SamplingParams

    outputs = llm.generate([*map(as_prompt, prompts)], SamplingParams(**sampling), use_tqdm=False)
    return {
        "tokens": [[list(sample.token_ids) for sample in output.outputs] for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "best": [[best(sample.logprobs) for sample in output.outputs] for output in outputs],
    }


if __name__ == "__main__":
    from vllm import LLM

    request = json.load(sys.stdin)
    llm = LLM(disable_log_stats=False, **request["engine"])
    rounds = [generate(llm, each["prompts"], each["sampling"]) for each in request["rounds"]]
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    report({"rounds": rounds, "counters": counters})
