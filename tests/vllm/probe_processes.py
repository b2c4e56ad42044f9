"""Hands a configuration with LITE_ATTENTION to child processes and reports which backend class each of them builds.

Input: {"model"}. Output: the class by start method, and by a child in which vLLM loads no platform plugin.
"""

import base64
import json
import multiprocessing
import os
import pickle
import subprocess
import sys

from processes import report

UNPICKLE = """
import base64, pickle, sys
config = pickle.loads(base64.b64decode(sys.stdin.read()))
print(config.backend.name, config.backend.get_path())
"""


def chosen_class(config) -> str:
    """What a worker does before it builds a model."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.selector import get_attn_backend

    load_general_plugins()
    with set_current_vllm_config(config):
        backend = get_attn_backend(64, torch.bfloat16, "auto")
    return f"{backend.__module__}.{backend.__qualname__}"


def in_child(method: str, config) -> str:
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.apply(chosen_class, (config,))


if __name__ == "__main__":
    from vllm.engine.arg_utils import EngineArgs

    model = json.load(sys.stdin)["model"]
    config = EngineArgs(model=model, attention_backend="LITE_ATTENTION", enforce_eager=True).create_engine_config()
    found = {method: in_child(method, config) for method in ("fork", "spawn")}
    # From 0.28 on VLLM_TARGET_DEVICE=cpu skips the platform plugins; with no plugins it is the same in all versions.
    bare = subprocess.run(
        [sys.executable, "-c", UNPICKLE],
        input=base64.b64encode(pickle.dumps(config.attention_config)).decode(),
        env={**os.environ, "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
    )
    found["no plugins"] = bare.stdout.strip().splitlines()[-1] if bare.returncode == 0 else bare.stderr[-2000:]
    report(found)
