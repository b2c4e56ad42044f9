"""Runs of vLLM's offline engine, each in a process of its own.

The process has the engine and its worker in it. By default vLLM starts a process for either, which imports all again;
and while the worker computes, the engine waits for it in a loop, with a core that the worker could use.
"""

from __future__ import annotations

from forks import run_in_fork
from processes import Reported, run

SMALL = {"layers": 3, "heads": 8, "kv_heads": 2, "head_dim": 64}
IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

GREEDY = {"temperature": 0, "max_tokens": 64, "ignore_eos": True}
SAMPLED = {"temperature": 0.8, "n": 3, "seed": 1234, "max_tokens": 24, "ignore_eos": True}


def greedy(prompts: list[str]) -> dict:
    return {"prompts": prompts, "sampling": GREEDY}


def generate(
    model: str, rounds: list[dict], environment: dict | None = None, apart: bool = False, **engine
) -> Reported:
    """What `probe_engine.py` reports of `LLM(**engine)` for `rounds` of prompts; float32 by default.

    With `apart` the engine and its worker have processes of their own, as by default.
    """
    defaults = {"model": model, "dtype": "float32", "max_model_len": 512, "enforce_eager": True, "seed": 0}
    argument = {"engine": defaults | engine, "rounds": rounds}
    if apart:
        return run("probe_engine.py", argument, **environment or {})
    return run_in_fork("probe_engine.py", argument, **IN_ONE_PROCESS, **environment or {})


def engine_arguments(model: str, settings: dict | None, **engine) -> dict:
    """Of an engine with these settings of lists, in float32 with pages of 16 tokens."""
    defaults = {
        "model": model,
        "attention_backend": "LITE_ATTENTION",
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "seed": 0,
        "block_size": 16,
        "additional_config": {} if settings is None else {"lite_attention": settings},
    }
    return defaults | engine


def generate_by_lists(model: str, rounds: list[dict], settings: dict | None, **engine) -> Reported:
    """What `probe_pages.py` reports of an engine with `engine_arguments`."""
    argument = {"engine": engine_arguments(model, settings, **engine), "rounds": rounds}
    return run_in_fork("probe_pages.py", argument, **IN_ONE_PROCESS)
