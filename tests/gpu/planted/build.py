"""Builds the kernels for head dim 128 in bfloat16, as they are and with each planted bug, in about 30 s of CPU a bug.

    python tests/gpu/planted/build.py OUT      # needs nvcc; OUT gets NAME.so for each bug, and sound.so

Head dim 128 has all there is: clusters, two consumer warpgroups, a tile for each kind of call.
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

INSTANCE = "csrc/sm90/instances/hd128_bf16.cu"
FIND_KERNEL = """\
#include "sm90/launch.h"
namespace lite_attention::sm90 {
Kernel find_kernel(ElementType, KeyType, int head_dim, TileKind kind, bool score_mod) {
  return head_dim <= 128 ? kernel<ElementType::kBFloat16, 128>(kind, score_mod) : Kernel{};
}
}  // namespace lite_attention::sm90
"""


def compile_kernels(tree: Path) -> Path:
    """Builds csrc/ of `tree`; objects that are there and fresh stay."""
    sources = sorted(path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*.cu"))
    build = tree / setup.BUILD
    build.mkdir(parents=True, exist_ok=True)
    (build / "build.ninja").write_text(setup.ninja_file(setup.find_nvcc(), sources))
    ninja = [sys.executable, "-m", "ninja", "-f", f"{setup.BUILD}/build.ninja", "-j", str(setup.max_jobs())]
    subprocess.run(ninja, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    return build / "_C.abi3.so"


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        sound = Path(scratch, "sound")
        shutil.copytree(ROOT / "csrc", sound / "csrc")
        for path in (sound / "csrc").glob("sm90/instances/*.cu"):
            if path != sound / INSTANCE:
                path.unlink()
        (sound / "csrc/sm90/find_kernel.cu").write_text(FIND_KERNEL)
        shutil.copy(compile_kernels(sound), out / "sound.so")

        def variant(bug: Bug) -> None:
            tree = Path(scratch, bug.name)
            shutil.copytree(sound, tree)  # with its objects and their times: only what the bug touches is compiled
            plant(bug, tree / "csrc")
            shutil.copy(compile_kernels(tree), out / f"{bug.name}.so")
            shutil.rmtree(tree)
            print(bug.name, flush=True)

        os.environ["MAX_JOBS"] = str(setup.max_jobs())
        with ThreadPoolExecutor(setup.max_jobs()) as pool:
            list(pool.map(variant, BUGS))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
