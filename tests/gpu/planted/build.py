"""Builds kernels for head dim 128, as they are and with each planted bug, in about a minute of CPU a bug.

    python tests/gpu/planted/build.py OUT [NAME...]   # needs nvcc; OUT gets NAME.so for each bug or for those named,
                                                      # and sound.so

Head dim 128 has all there is: clusters, two consumer warpgroups, a tile for each kind of call. Bugs that FP8 tests are
to catch are built over FP8 queries, the others over bfloat16; the sound library has both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from bugs import BUGS, Bug, plant  # noqa: E402

import setup  # noqa: E402

BFLOAT16, FP8 = "hd128_bf16", "hd128_fp8qkv"
KERNELS = {  # the type of keys that an instance is for, and where its kernel is
    BFLOAT16: ("KeyType::kAsQueries", "kernel<ElementType::kBFloat16, 128>(kind, score_mod)"),
    FP8: ("KeyType::kE4M3Queries", "fp8_qkv_kernel<128>(score_mod)"),
}
# Metadata has room for the tiles of all types of keys, so the library must know one for those that it has no kernel of.
FIND_KERNEL = """\
#include "sm90/launch.h"
namespace lite_attention::sm90 {
Kernel find_kernel(ElementType, KeyType keys, int head_dim, TileKind kind, bool score_mod) {
  if (head_dim > 128) return {};
%(kernels)s
  Kernel lacking = %(any)s;
  lacking.launch = [](const FwdParams&, cudaStream_t) { return cudaErrorNotSupported; };
  return lacking;
}
}
"""


def find_kernel(instances: tuple[str, ...]) -> str:
    """The source of what finds one of these kernels."""
    kernels = [KERNELS[name] for name in instances]
    returns = "\n".join(f"  if (keys == {keys}) return {kernel};" for keys, kernel in kernels)
    return FIND_KERNEL % {"kernels": returns, "any": kernels[0][1]}


def only(instances: tuple[str, ...], csrc: Path) -> None:
    """Leaves these of the kernels in the copy of csrc/ at `csrc`."""
    for path in csrc.glob("sm90/instances/*.cu"):
        if path.stem not in instances:
            path.unlink()
    (csrc / "sm90/find_kernel.cu").write_text(find_kernel(instances))


def compile_kernels(tree: Path) -> Path:
    """Builds csrc/ of `tree`; objects that are there and fresh stay."""
    sources = sorted(path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*.cu"))
    build = tree / setup.BUILD
    build.mkdir(parents=True, exist_ok=True)
    (build / "build.ninja").write_text(setup.ninja_file(setup.find_nvcc(), sources))
    ninja = [sys.executable, "-m", "ninja", "-f", f"{setup.BUILD}/build.ninja", "-j", str(setup.max_jobs())]
    subprocess.run(ninja, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    return build / "_C.abi3.so"


def deliver(library: Path, to: Path) -> None:
    """Whoever sees the file sees all of it."""
    part = to.with_suffix(".part")
    shutil.copy(library, part)
    part.rename(to)
    print(to.stem, flush=True)


def main(out: Path, names: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if unknown := set(names) - {bug.name for bug in BUGS}:
        raise SystemExit(f"no such bugs: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as scratch:
        sound = Path(scratch, "sound")
        shutil.copytree(ROOT / "csrc", sound / "csrc")
        only((BFLOAT16, FP8), sound / "csrc")
        deliver(compile_kernels(sound), out / "sound.so")

        def variant(bug: Bug) -> None:
            tree = Path(scratch, bug.name)
            shutil.copytree(sound, tree)  # with its objects and their times: only what the bug touches is compiled
            plant(bug, tree / "csrc")
            only((FP8,) if bug.tests == "fp8" else (BFLOAT16,), tree / "csrc")
            deliver(compile_kernels(tree), out / f"{bug.name}.so")
            shutil.rmtree(tree)

        os.environ["MAX_JOBS"] = str(setup.max_jobs())
        with ThreadPoolExecutor(setup.max_jobs()) as pool:
            list(pool.map(variant, [bug for bug in BUGS if not names or bug.name in names]))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
