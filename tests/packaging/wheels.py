"""Building a wheel of this tree, and looking into it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
INPUTS = ("LICENSE-BSD", "LICENSE-MIT", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("csrc", "lite_attention", "vllm_plugin")


@dataclass(frozen=True)
class Wheel:
    path: Path
    site: Path  # where it is unpacked, as in site-packages
    log: str  # what the build printed

    @property
    def names(self) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            return archive.namelist()

    def read(self, name: str) -> str:
        """A file of its dist-info."""
        return next(self.site.glob("*.dist-info")).joinpath(name).read_text()

    def python(self, *arguments: str) -> str:
        """What this Python prints with the wheel before everything else on its path."""
        environment = os.environ | {"PYTHONPATH": str(self.site), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=self.site, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def copy_tree(tree: Path) -> None:
    """Copies what a build reads, so that nothing left in this tree by another build gets into its result."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for name in INPUTS:
        shutil.copy2(ROOT / name, tree / name)


def build(folder: Path, environment: dict[str, str]) -> Wheel:
    """A wheel of this tree, built and unpacked below `folder`."""
    tree = folder / "tree"
    copy_tree(tree)
    if (ROOT / "build" / "kernels").exists():  # with its times, by which ninja knows that the objects are up to date
        shutil.copytree(ROOT / "build" / "kernels", tree / "build" / "kernels")
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    done = subprocess.run(
        command, cwd=tree, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    path = next(folder.glob("*.whl"))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return Wheel(path, folder / "site", done.stdout)
