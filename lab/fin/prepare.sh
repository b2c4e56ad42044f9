#!/bin/bash
# prepare.sh NEW : in /work/main, packs a commit for build.sh and go.sh.
cd "$(dirname "$0")"; rm -f *.xz
git -C /work/main archive $1 csrc lite_attention vllm_plugin tests benchmarks tools setup.py pyproject.toml README.md | xz -6 > new.tar.xz
git -C /work/main rev-parse --short $1 > commit; ls -la
