"""The decisions that setup.py takes: which nvcc, how many jobs, which flags."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from wheels import ROOT


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with none of the variables set that steer it."""
    for name in ("CUDA_HOME", "CUDA_PATH", "LITE_ATTENTION_SKIP_CUDA_BUILD", "MAX_JOBS", "NVCC_THREADS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("lite_attention_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _toolkit(folder: Path, version: str) -> Path:
    """A CUDA toolkit that can say its version and nothing else."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.99'\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return folder


def test_setup_stays_small() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 150


def test_max_jobs_is_honoured(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "free_gib", lambda: 1.0)
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.max_jobs() == 7


@pytest.mark.parametrize(
    ("gib", "cores", "jobs"), [(1.0, 8, 1), (5.9, 8, 1), (6.1, 8, 2), (200.0, 8, 8), (200.0, 1, 1)]
)
def test_jobs_are_limited_by_free_memory_and_cores(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, gib: float, cores: int, jobs: int
) -> None:
    monkeypatch.setattr(build, "free_gib", lambda: gib)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert build.max_jobs() == jobs


def test_free_memory_is_what_the_kernel_says(build: ModuleType) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert 0.05 < build.free_gib() <= total


def test_ninja_gets_the_jobs(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "ninja_file", lambda nvcc, sources: "")
    monkeypatch.setattr(build.subprocess, "run", run)
    monkeypatch.setenv("MAX_JOBS", "3")
    extension = build.Extension("lite_attention._C", ["csrc/x.cu"])
    from setuptools import Distribution

    with pytest.raises(SystemExit, match="did not compile"):
        build.BuildKernels(Distribution()).build_extension(extension)
    (command,) = commands
    assert command[command.index("-j") + 1] == "3"


@pytest.mark.parametrize(("given", "flag"), [(None, "--threads 1"), ("", "--threads 1"), ("4", "--threads 4")])
def test_nvcc_threads_is_honoured(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None, flag: str
) -> None:
    monkeypatch.setattr(build, "package_dir", lambda name: tmp_path / name)
    if given is not None:
        monkeypatch.setenv("NVCC_THREADS", given)
    text = build.ninja_file("/cuda/bin/nvcc", ["csrc/a.cu", "csrc/b/c.cu"])
    flags = next(line for line in text.splitlines() if line.startswith("flags = "))
    assert f" {flag} " in flags
    for source in ("csrc/a.cu", "csrc/b/c.cu"):
        assert f"build build/kernels/{source}.o: compile {source}" in text


def test_cuda_home_goes_before_path(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, other = _toolkit(tmp_path / "home", "13.0"), _toolkit(tmp_path / "other", "12.9")
    monkeypatch.setenv("PATH", f"{other / 'bin'}:{os.environ['PATH']}")
    assert build.find_nvcc() == str(other / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build.find_nvcc() == str(home / "bin" / "nvcc")
    monkeypatch.setenv("LITE_ATTENTION_SKIP_CUDA_BUILD", "1")
    assert build.find_nvcc() is None


def test_a_cuda_home_without_nvcc_is_an_error(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"CUDA_HOME is .* no bin/nvcc"):
        build.find_nvcc()


@pytest.mark.parametrize("version", ["11.8", "12.4", "12.7"])
def test_an_old_nvcc_ends_the_build(build: ModuleType, tmp_path: Path, version: str) -> None:
    nvcc = _toolkit(tmp_path, version) / "bin" / "nvcc"
    with pytest.raises(SystemExit, match=rf"CUDA {version}; .* 12\.8 or newer.* LITE_ATTENTION_SKIP_CUDA_BUILD=1"):
        build.check_nvcc(str(nvcc))


@pytest.mark.parametrize("version", ["12.8", "12.10", "13.0", "14.1"])
def test_a_new_enough_nvcc_passes(build: ModuleType, tmp_path: Path, version: str) -> None:
    build.check_nvcc(str(_toolkit(tmp_path, version) / "bin" / "nvcc"))
