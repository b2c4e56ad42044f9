#!/bin/bash
# prepare.sh SOFTMAX BASE : in /work/main, packs the two commits that build.sh makes variants of.
cd "$(dirname "$0")"
for c in "$1:new" "$2:base"; do git -C /work/main archive ${c%%:*} csrc lite_attention setup.py pyproject.toml README.md | xz -6 > ${c##*:}.tar.xz; done
cp ../tools/inner.py .; ls -la
