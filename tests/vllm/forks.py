"""Runs scripts of this folder as `processes.run` does, in forks of one process that has imported vLLM.

The imports take longer than most of the engines. A fork is where a process of its own would be after them: no engine
was configured and no thread of PyTorch's started.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from processes import HERE, Reported, environment, reported

_parent: subprocess.Popen | None = None


def run_in_fork(script: str, argument: Any = None, timeout: int = 600, **changes: str) -> Reported:
    """As `processes.run`."""
    global _parent
    if _parent is None:
        _parent = subprocess.Popen(
            [sys.executable, str(HERE / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=HERE,
            start_new_session=True,
        )
        atexit.register(_end, _parent)
    with tempfile.TemporaryDirectory() as folder:
        streams = {name: str(Path(folder, name)) for name in ("stdin", "stdout", "stderr")}
        Path(streams["stdin"]).write_text(json.dumps(argument))
        job = {"script": script, "streams": streams, "variables": environment(**changes)}
        print(json.dumps(job), file=_parent.stdin, flush=True)
        answered, _, _ = select.select([_parent.stdout], [], [], timeout)
        status = _parent.stdout.readline().strip() if answered else f"no answer after {timeout} s"
        if not status.lstrip("-").isdigit():
            os.killpg(_parent.pid, signal.SIGKILL)
            _end(_parent)
            _parent = None
        stdout, stderr = (Path(streams[name]).read_text(errors="replace") for name in ("stdout", "stderr"))
    return reported(script, status, stdout, stderr)


def _end(parent: subprocess.Popen) -> None:
    with parent:  # closes its stdin, by which it ends, and waits
        pass


def _serve() -> None:
    """For each line of stdin: runs that script in a fork, and prints its status."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import vllm.entrypoints.llm
    import vllm.model_executor.models.llama
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_run(**json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _run(script: str, streams: dict[str, str], variables: dict[str, str]) -> int:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(streams[name], os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [str(HERE / script)]
    try:
        with open(0, closefd=False) as sys.stdin:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    _serve()
