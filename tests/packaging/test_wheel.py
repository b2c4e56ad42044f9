"""What is in the wheels, what their tags promise, and that what they say of themselves holds."""

from __future__ import annotations

import email
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from packaging.utils import parse_wheel_filename
from wheels import FOLDERS, INPUTS, ROOT, Wheel, copy_tree

EXTENSION = "lite_attention/_C.abi3.so"

pytestmark = pytest.mark.timeout(3600)  # the first test may have to compile the kernels


def _modules() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in FOLDERS
        for path in (ROOT / package).rglob("*.py")
        if "__pycache__" not in path.parts
    }


def _tag(wheel: Wheel) -> str:
    _, _, _, tags = parse_wheel_filename(wheel.path.name)
    return str(next(iter(tags))) if len(tags) == 1 else str(sorted(map(str, tags)))


def _outside_dist_info(wheel: Wheel) -> set[str]:
    return {name for name in wheel.names if ".dist-info/" not in name}


def test_without_kernels_the_wheel_is_pure_and_says_so(plain_wheel: Wheel) -> None:
    assert _tag(plain_wheel) == "py3-none-any"
    assert _outside_dist_info(plain_wheel) == _modules()
    assert "WITHOUT its Hopper kernels" in plain_wheel.log


def test_with_kernels_the_wheel_is_abi3_for_this_platform(kernel_wheel: Wheel) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert _tag(kernel_wheel) == f"cp310-abi3-{platform}"
    assert _outside_dist_info(kernel_wheel) == _modules() | {EXTENSION}
    assert "WITHOUT its Hopper kernels" not in kernel_wheel.log


def test_metadata(plain_wheel: Wheel) -> None:
    metadata = email.message_from_string(plain_wheel.read("METADATA"))
    assert metadata["Name"] == "lite-attention"
    assert metadata["License-Expression"] == "MIT AND BSD-3-Clause"
    assert set(metadata.get_all("License-File")) == {"LICENSE-MIT", "LICENSE-BSD"}
    assert "LITE_ATTENTION" in metadata.get_payload(), "the README is not the long description"
    required = metadata.get_all("Requires-Dist")
    assert [one for one in required if "extra ==" not in one] == ["torch>=2.10"]
    (vllm,) = [one for one in required if one.startswith("vllm")]
    assert re.sub(r"\s", "", vllm).startswith("vllm<0.34,>=0.26;extra==")
    version = plain_wheel.python("-c", "import lite_attention; print(lite_attention.__version__)")
    assert metadata["Version"] == version.strip()


def test_licences_travel_with_the_wheel(plain_wheel: Wheel) -> None:
    for name in ("LICENSE-MIT", "LICENSE-BSD"):
        assert plain_wheel.read(f"licenses/{name}") == (ROOT / name).read_text()


def test_the_source_distribution_builds_the_kernels_too(tmp_path: Path) -> None:
    """It holds all that a build of the wheel reads: every file of csrc/ among them."""
    copy_tree(tmp_path / "tree")
    (tmp_path / "sdist").mkdir()
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path / 'sdist')!r})"
    environment = os.environ | {"LITE_ATTENTION_SKIP_CUDA_BUILD": "1"}  # whether or not there was nvcc
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "tree", env=environment, check=True)
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {member.name.partition("/")[2] for member in tar if member.isfile()}
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert needed | _modules() | set(INPUTS) <= packed


def test_entry_points_resolve(plain_wheel: Wheel) -> None:
    parser = ConfigParser()
    parser.read_string(plain_wheel.read("entry_points.txt"))
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"lite-attention": "lite_attention.cli:main"},
        "vllm.platform_plugins": {"lite_attention": "vllm_plugin.register:platform_plugin"},
        "vllm.general_plugins": {"lite_attention": "vllm_plugin.register:general_plugin"},
    }
    # From the wheel and not from an installed copy; the plugins' modules must import without vLLM.
    plain_wheel.python(
        "-c",
        "import importlib.metadata as metadata, pathlib\n"
        "distribution = next(d for d in metadata.distributions(path=['.']) if d.name == 'lite-attention')\n"
        "for entry in distribution.entry_points:\n"
        "    function = entry.load()\n"
        "    assert callable(function), entry\n"
        "    file = pathlib.Path(function.__code__.co_filename).resolve()\n"
        "    assert file.is_relative_to(pathlib.Path.cwd().resolve()), file",
    )


def _dynamic_symbols(wheel: Wheel, *options: str) -> list[tuple[str, str]]:
    output = subprocess.run(
        ["nm", "-D", *options, str(wheel.site / EXTENSION)], capture_output=True, text=True, check=True
    ).stdout
    return [tuple(line.split()[-2:]) for line in output.splitlines()]


def test_the_kernels_import_only_the_stable_abi(kernel_wheel: Wheel) -> None:
    """What has no version is torch's or Python's: glibc and libstdc++ version their symbols.

    A few of libstdc++'s own come without, as torch exports copies of them.
    """
    imported = [name for kind, name in _dynamic_symbols(kernel_wheel, "--undefined-only") if kind == "U"]
    foreign = {name for name in imported if "@" not in name and not re.match(r"_ZN[KV]*St", name)}
    assert {"aoti_torch_get_current_cuda_stream", "aoti_torch_library_init_impl"} <= foreign
    assert not {name for name in foreign if not re.match(r"(aoti_)?torch_", name)}


def test_the_kernels_export_no_symbol_of_their_own(kernel_wheel: Wheel) -> None:
    """CUTLASS or the CUDA runtime exported from here could meet another extension's."""
    exported = [name for _, name in _dynamic_symbols(kernel_wheel, "--defined-only")]
    assert not [name for name in exported if re.search(r"cutlass|cute|lite|cuda", name)]


def test_the_kernels_need_neither_the_driver_nor_a_cuda_runtime_nor_python(kernel_wheel: Wheel) -> None:
    output = subprocess.run(
        ["readelf", "-d", str(kernel_wheel.site / EXTENSION)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", output))
    assert {"libtorch", "libtorch_cpu", "libtorch_cuda", "libc10"} <= needed
    assert not {name for name in needed if re.match(r"libcuda|libcudart|libpython|libtorch_python", name)}
    assert not re.search(r"RPATH|RUNPATH", output), "a path of the build machine"


def _kernels(wheel: Wheel) -> str:
    return json.loads(wheel.python("-m", "lite_attention", "info", "--json"))["kernels"]


def test_info_without_kernels(plain_wheel: Wheel) -> None:
    assert _kernels(plain_wheel).startswith("unusable: it was not built")


def test_info_with_kernels(kernel_wheel: Wheel) -> None:
    if torch.version.cuda is None:
        assert re.match(r"unusable: it is built .* torch \S+ has no CUDA", _kernels(kernel_wheel))
    else:
        assert _kernels(kernel_wheel) == "loaded, for sm_90a"


def test_info_as_text(plain_wheel: Wheel) -> None:
    lines = plain_wheel.python("-m", "lite_attention", "info").splitlines()
    shown = {line[:15].strip(): line[15:].strip() for line in lines}
    assert list(shown) == ["lite-attention", "Python", "torch", "GPU", "kernels", "vLLM"]
    assert shown["torch"].startswith(torch.__version__)
    vllm = importlib.util.find_spec("vllm")
    if vllm is not None and vllm.origin is not None:  # tests/vllm looks like a package without code
        assert shown["vLLM"].endswith("LITE_ATTENTION registered")
    else:
        assert shown["vLLM"] == "not installed"
