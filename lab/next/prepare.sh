#!/bin/bash
# prepare.sh NEW BASE : in /work/main, packs two commits for go.sh.
cd "$(dirname "$0")"; i=0
for c in "$1:new" "$2:base"; do git -C /work/main archive ${c%%:*} csrc lite_attention vllm_plugin tests benchmarks setup.py pyproject.toml README.md | xz -6 > ${c##*:}.tar.xz; done
git -C /work/main rev-parse --short $1 > commit; cp ../tools/inner.py .; ls -la
