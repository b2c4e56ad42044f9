#!/bin/bash
# prepare.sh NEW BASE : in /work/main, packs two commits.
cd "$(dirname "$0")"; rm -f *.xz
for c in "$1:new" "$2:base"; do git -C /work/main archive ${c%%:*} csrc lite_attention vllm_plugin tests benchmarks tools setup.py pyproject.toml README.md | xz -6 > ${c##*:}.tar.xz; done
git -C /work/main rev-parse --short $1 > commit; ls -la
