"""Runs a vLLM server as a child process: start, wait for health, chat, stop with all of its processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import requests

_POLL_SECONDS = 0.5
_STOP_SECONDS, _KILL_SECONDS = 10, 5
_MESSAGE = re.compile(r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+[\d-]+ [\d:.]+ \[[^\]]*\]\s*(?P<text>.+)")


class ServerError(RuntimeError):
    """The server ended, did not become healthy in time, or answered a request with an error."""


def free_port() -> int:
    """A loopback TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that were closed do not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def log_message(line: str) -> str | None:
    """The text of a line of vLLM's log without its level, time and source, or None where the line is something else."""
    found = _MESSAGE.search(line)
    return found["text"] if found else None


class Server:
    """A server process, used as a context manager: leaving it, for whatever reason, stops the server and its children.

    `command` must make it listen on `port` of the loopback interface. Its output goes to the file `log`.
    Entering raises ServerError where the port is in use.
    """

    def __init__(self, command: Sequence[str], port: int, log: Path, env: dict[str, str] | None = None) -> None:
        self.command = list(command)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.env = env
        self._http = requests.Session()
        self._http.trust_env = False  # a proxy of the environment does not know this machine's loopback

    def __enter__(self) -> Server:
        if not _is_free(self.port):  # what listens there would be taken for the server that is to be started
            raise ServerError(f"port {self.port} is in use")
        with open(self.log, "wb") as output:
            # In its own session a Ctrl-C of the terminal does not reach it: this process stops it, in order.
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.env,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process, which has started its others."""
        return self._process.pid

    def wait(self) -> int:
        """Waits until the server ends by itself; returns its status."""
        return self._process.wait()

    def stop(self) -> None:
        """Ends the server: SIGTERM, and SIGKILL for what is left of its processes after ten seconds or upon Ctrl-C."""
        self._http.close()
        try:
            self._end(signal.SIGTERM, _STOP_SECONDS)  # vLLM heeds it at once, except while it starts
        finally:
            self._end(signal.SIGKILL, _KILL_SECONDS)

    def _end(self, number: int, seconds: float) -> None:
        """Sends a signal to all processes of the server and waits up to `seconds` for them to end."""
        deadline = time.monotonic() + seconds
        alive = self._signal(number)
        while alive and time.monotonic() < deadline:
            self._process.poll()  # reaps the server: a zombie would keep its group alive
            time.sleep(0.05)
            alive = self._signal(0)

    def _signal(self, number: int) -> bool:
        """Sends a signal to all processes of the server; False where none is left."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def output(self) -> str:
        """All that the server has written so far."""
        return self.log.read_text(errors="replace")

    def messages(self) -> list[str]:
        """The messages of vLLM's log so far."""
        return [text for line in self.output().splitlines() if (text := log_message(line))]

    def wait_healthy(self, timeout: float, progress: Callable[[str], None] = lambda message: None) -> None:
        """Returns once GET /health answers 200. `progress` is called about twice a second with the latest log message.

        Raises ServerError where the server ends before, or is not healthy after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (status := self._process.poll()) is not None:
                raise ServerError(f"the server ended with status {status} before it was healthy")
            try:
                if self._http.get(f"{self.url}/health", timeout=5).ok:
                    return
            except requests.RequestException:
                pass  # not listening yet
            progress(next(reversed(self.messages()), "starting"))
            time.sleep(_POLL_SECONDS)
        raise ServerError(f"the server was not healthy after {timeout:.0f} seconds")

    def chat(self, model: str, prompt: str, max_tokens: int = 128) -> Iterator[str]:
        """Asks one question, greedily decoded, and yields the pieces of the answer as they arrive.

        Raises ServerError where the server answers with an error or the connection breaks.
        """
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        try:
            with self._http.post(
                f"{self.url}/v1/chat/completions", json=body, stream=True, timeout=(5, 300)
            ) as response:
                if not response.ok:
                    raise ServerError(f"the server answered with status {response.status_code}: {response.text}")
                # Server-sent events: lines "data: {...}", the last one "data: [DONE]".
                for line in response.iter_lines():
                    data = line.removeprefix(b"data: ")
                    if line == data or data == b"[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise ServerError(f"the server broke off: {event['error']}")
                    for choice in event["choices"]:
                        yield choice["delta"].get("content") or ""
        except requests.RequestException as error:
            raise ServerError(f"the request failed: {error}") from error
