"""Where a run took place: GPU, driver, clocks, versions, commit."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path

import torch

import lite_attention

SMI_FIELDS = {
    "driver": "driver_version",
    "SM clock": "clocks.sm",
    "SM clock, highest": "clocks.max.sm",
    "memory clock": "clocks.mem",
    "power": "power.draw",
    "power limit": "power.limit",
    "temperature in °C": "temperature.gpu",
}
LOAD_SECONDS = 1.0  # of products queued while the clocks are read: idle clocks say nothing


def environment(device: torch.device, commit: str | None) -> dict[str, str]:
    """What was run, where. `commit` is what the caller knows it to be; else git is asked."""
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit or _commit(),
        "LiteAttention": lite_attention.__version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "Python": platform.python_version(),
    }
    if device.type == "cpu":
        return {"GPU": "none: run on the CPU"} | found
    return {"GPU": torch.cuda.get_device_name(device)} | _under_load(device) | found


def _under_load(device: torch.device) -> dict[str, str]:
    """Driver, clocks and power, by nvidia-smi, while the GPU multiplies matrices."""
    side = 8192
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    for _ in range(round(LOAD_SECONDS * 700e12 / (2 * side**3))):
        a @ a
    # Its own numbers of the GPUs are not those of CUDA_VISIBLE_DEVICES.
    command = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"]
    query = [f"--query-gpu={','.join(SMI_FIELDS.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run([*command, *query], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return dict.fromkeys(SMI_FIELDS, f"unknown: {error}")
    finally:
        torch.cuda.synchronize()
    return dict(zip(SMI_FIELDS, (value.strip() for value in done.stdout.strip().split(",")), strict=True))


def _commit() -> str:
    """The commit of this package's sources, where they are in a checkout of their own."""
    folder = Path(lite_attention.__file__).parent
    # An installed copy may lie inside of another project's checkout, whose commit isn't ours.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown: not run from a git checkout; --commit names it"
    changed = " with changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else ""
    return f"{_git(folder, 'rev-parse', 'HEAD')}{changed}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
