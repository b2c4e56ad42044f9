"""Builds the wheel; with nvcc, also the Hopper kernels of csrc/ as lite_attention/_C.abi3.so.

The extension is a library of torch ops on PyTorch's stable ABI, not a Python module. Nothing of Python or of libtorch's
C++ ABI is compiled in: one cp310-abi3 wheel serves every torch from 2.10 on, and a CPU-only torch and no GPU will do
for the build. ninja compiles each source to an object in build/kernels, which stays for the next build.

Environment: CUDA_HOME (where nvcc is; else PATH), MAX_JOBS (compilations at once), NVCC_THREADS (nvcc --threads),
LITE_ATTENTION_SKIP_CUDA_BUILD=1 (no kernels even where nvcc is found).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cu"))
BUILD = "build/kernels"
STUB = "csrc/libtorch_cuda_stub.c"
OLDEST_CUDA = (12, 8)
GIB_PER_JOB = 3  # peak of one nvcc on a CUTLASS kernel

NVCC_FLAGS = (
    "-std=c++17 -O3 -DNDEBUG -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr --expt-extended-lambda "
    "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED -DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA "
    "-Xcompiler=-fPIC,-fvisibility=hidden"
)
LINK_FLAGS = "-shared -Xlinker=--no-as-needed,-z,defs,--exclude-libs,ALL -ltorch -ltorch_cpu -ltorch_cuda -lc10"

NINJA_RULES = """\
rule compile
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule stub
  command = $nvcc -shared -Xcompiler=-fPIC -Xlinker=-soname,libtorch_cuda.so $in -o $out
rule link
  command = $nvcc $in -o $out $ldflags
"""


def find_nvcc() -> str | None:
    """The nvcc to build with, or None where the wheel is to have no kernels."""
    if os.environ.get("LITE_ATTENTION_SKIP_CUDA_BUILD", "0") not in ("", "0"):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if home and nvcc is None:
        raise SystemExit(f"CUDA_HOME is {home}, but there is no bin/nvcc in it. Unset it, or set it to a CUDA toolkit.")
    return nvcc


def check_nvcc(nvcc: str) -> None:
    """Ends the build where this nvcc is too old for the kernels."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None or tuple(map(int, found.groups())) < OLDEST_CUDA:
        version = ".".join(found.groups()) if found else "of unknown version"
        raise SystemExit(
            f"{nvcc} is CUDA {version}; the kernels need CUDA {'.'.join(map(str, OLDEST_CUDA))} or newer. "
            "Set CUDA_HOME to a newer toolkit, or LITE_ATTENTION_SKIP_CUDA_BUILD=1 to install without kernels."
        )


def package_dir(name: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"The build needs the Python package {name}: see build-system.requires in pyproject.toml.")
    return Path(spec.submodule_search_locations[0])


def free_gib() -> float:
    """Memory that a build may take now: what the kernel calls available, and no more than the container's limit."""
    free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1)) / 2**20
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) / 2**30)
    return free


def max_jobs() -> int:
    """Compilations at once: MAX_JOBS, or as many as cores and free memory allow."""
    if given := os.environ.get("MAX_JOBS"):
        return max(1, int(given))
    return max(1, min(len(os.sched_getaffinity(0)), int(free_gib() / GIB_PER_JOB)))


def ninja_file(nvcc: str, sources: list[str]) -> str:
    """The text of build.ninja, to be run at the root of the repository."""
    torch, cutlass = package_dir("torch"), package_dir("cutlass_library") / "source" / "include"
    threads = max(1, int(os.environ.get("NVCC_THREADS") or 1))
    objects = {source: f"{BUILD}/{source}.o" for source in sources}
    return f"""\
builddir = {BUILD}
nvcc = {nvcc}
flags = {NVCC_FLAGS} --threads {threads} -Icsrc -isystem {torch}/include -isystem {cutlass}
ldflags = -L{BUILD} -L{torch}/lib {LINK_FLAGS}
{NINJA_RULES}
build {BUILD}/libtorch_cuda.so: stub {STUB}
build {BUILD}/_C.abi3.so: link {" ".join(objects.values())} | {BUILD}/libtorch_cuda.so
""" + "".join(f"build {target}: compile {source}\n" for source, target in objects.items())


class BuildKernels(build_ext):
    """Hands the compilation to ninja and puts its result where setuptools expects the extension."""

    def build_extension(self, ext: Extension) -> None:
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        (ROOT / BUILD / "build.ninja").write_text(ninja_file(find_nvcc(), ext.sources))
        ninja = [sys.executable, "-m", "ninja", "-f", f"{BUILD}/build.ninja", "-j", str(max_jobs())]
        if subprocess.run(ninja, cwd=ROOT).returncode:
            raise SystemExit("The kernels did not compile: see above.")
        self.mkpath(str(Path(self.get_ext_fullpath(ext.name)).parent))
        self.copy_file(str(ROOT / BUILD / "_C.abi3.so"), self.get_ext_fullpath(ext.name))


def main() -> None:
    nvcc = find_nvcc()
    if nvcc and SOURCES:
        check_nvcc(nvcc)
        setup(
            ext_modules=[Extension("lite_attention._C", SOURCES, py_limited_api=True)],
            cmdclass={"build_ext": BuildKernels},
            options={"bdist_wheel": {"py_limited_api": "cp310"}},
        )
    else:
        why = "csrc/ has none" if nvcc else "no nvcc on PATH or in CUDA_HOME, or LITE_ATTENTION_SKIP_CUDA_BUILD is set"
        print(f"\n*** LiteAttention is built WITHOUT its Hopper kernels: {why}. ***\n", file=sys.stderr)
        setup()


if __name__ == "__main__":
    main()
