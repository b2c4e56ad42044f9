"""Fetches the tests that vLLM ships in its source distribution, and not in its wheels.

pip downloads a source distribution only together with its metadata, for which it would build vLLM. The stand-in for the
build backend below answers that question from PKG-INFO; index, proxies and certificates are the ones pip is configured
for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

BACKEND = """
import pathlib

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    text = pathlib.Path("PKG-INFO").read_text()
    fields = dict(line.split(": ", 1) for line in text.split("\\n\\n")[0].splitlines() if ": " in line)
    name, version = fields["Name"], fields["Version"]
    info = pathlib.Path(directory, f"{name}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name
"""


def vllm_tests(version: str, cache: Path) -> Path:
    """A folder, kept in `cache`, whose package `tests` is the one of vLLM `version` (45 MB to download)."""
    target = cache / f"vllm-{version}-tests"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        folder = Path(scratch)
        (folder / "setuptools").mkdir()
        (folder / "setuptools" / "__init__.py").touch()
        (folder / "setuptools" / "build_meta.py").write_text(BACKEND)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary=vllm",
            "--no-build-isolation",
        ]
        subprocess.run(
            [*command, "-d", str(folder), f"vllm=={version}"], check=True, env={**os.environ, "PYTHONPATH": str(folder)}
        )
        (archive,) = folder.glob("vllm-*.tar.gz")
        with tarfile.open(archive) as tar:
            root = archive.name.removesuffix(".tar.gz")
            wanted = [member for member in tar if member.name.startswith(f"{root}/tests/v1/attention/")]
            wanted += [tar.getmember(f"{root}/tests/{name}") for name in ("__init__.py", "v1/__init__.py")]
            tar.extractall(folder, members=wanted, filter="data")
        (folder / root).rename(target)
    return target
