"""The `lite-attention` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence

from lite_attention.bench import command as bench
from lite_attention.quality import command as quality


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB)"
        )
    return found


def _kernels() -> str:
    from lite_attention import ops

    return f"unusable: {ops.EXTENSION_MISSING}" if ops.EXTENSION_MISSING else "loaded, for sm_90a"


def _vllm() -> str:
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        device = (
            current_platform.device_type
        )  # the platform is looked for here, and with it vLLM's platform plugins load
    except Exception as error:  # a broken vLLM is a finding to be told, of whatever kind
        return f"{version}, which cannot be imported: {type(error).__name__}: {error}"
    registered = "registered" if "LITE_ATTENTION" in AttentionBackendEnum.__members__ else "not registered"
    return f"{version} for {device or 'no device'}, LITE_ATTENTION {registered}"


def info() -> dict[str, str | list[str]]:
    """What is installed here and what of it works, each under the name it is printed with."""
    import torch

    import lite_attention

    return {
        "lite-attention": lite_attention.__version__,
        "Python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "GPU": _gpus() or "none",
        "kernels": _kernels(),
        "vLLM": _vllm(),
    }


def _print_info(arguments: argparse.Namespace) -> int:
    found = info()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in found.items():
        for line in [value] if isinstance(value, str) else value:
            print(f"{name:<15} {line}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="lite-attention", description="LiteAttention: attention for NVIDIA Hopper GPUs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shown = commands.add_parser(
        "info", help="versions, GPUs, whether the kernels are built, whether vLLM knows the backend"
    )
    shown.add_argument("--json", action="store_true", help="print JSON")
    shown.set_defaults(run=_print_info)
    timed = commands.add_parser(
        "bench",
        help="times the kernels beside FA3, FA4 and cuDNN, once their results agree",
        description=bench.run.__doc__,
    )
    bench.add_arguments(timed)
    timed.set_defaults(run=bench.run)
    judged = commands.add_parser(
        "quality",
        help="what decoding from listed pages costs a model: loss, bytes read, retrieval, agreement of outputs",
        description=quality.run.__doc__,
    )
    quality.add_arguments(judged)
    judged.set_defaults(run=quality.run)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
