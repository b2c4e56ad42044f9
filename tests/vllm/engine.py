"""Runs of vLLM's offline engine, each in a process of its own."""

from __future__ import annotations

from processes import run

GREEDY = {"temperature": 0, "max_tokens": 64, "ignore_eos": True}
SAMPLED = {"temperature": 0.8, "n": 3, "seed": 1234, "max_tokens": 24, "ignore_eos": True}


def greedy(prompts: list[str]) -> dict:
    return {"prompts": prompts, "sampling": GREEDY}


def generate(model: str, rounds: list[dict], environment: dict | None = None, **engine) -> dict:
    """What `probe_engine.py` reports of `LLM(**engine)` for `rounds` of prompts; float32 by default."""
    defaults = {"model": model, "dtype": "float32", "max_model_len": 512, "enforce_eager": True, "seed": 0}
    return run("probe_engine.py", {"engine": defaults | engine, "rounds": rounds}, **environment or {})


def generate_by_lists(model: str, rounds: list[dict], settings: dict | None, environment: dict | None = None, **engine):
    """What `probe_pages.py` reports of an engine with these settings of lists, in float32 with pages of 16 tokens."""
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
    return run("probe_pages.py", {"engine": defaults | engine, "rounds": rounds}, **environment or {})
