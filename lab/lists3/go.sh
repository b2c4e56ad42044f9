#!/bin/bash
# seconds: 60
[ -f /tmp/fa3.so ] || xz -dc $ROOT/.dev/q/fa3/fa3.so.xz > /tmp/fa3.so; export LITE_ATTENTION_FA3=/tmp/fa3.so PYTHONUNBUFFERED=1
here=$PWD; P=/tmp/L3/run; nvidia-smi --query-gpu=name --format=csv,noheader | head -1
for n in base final; do d=$P/$n; mkdir -p $d; cp -r $ROOT/lite_attention $ROOT/tests $ROOT/pyproject.toml $d; xz -dc $n.so.xz > $d/lite_attention/_C.abi3.so; done
cd $P; PYTHONPATH=$P/final timeout 15 python $here/smoke.py 2>&1 | tail -3
PER=6 ROUNDS=4 timeout 26 python $here/compare.py 'dense.*(8x2k|32k)|skip full 0.[589]|skip causal 0.[89]' FA3=$P/base base=$P/base final=$P/final
(cd final; PYTHONPATH=$PWD timeout 22 python -m pytest -q -x -n 16 -p no:benchmark tests/gpu/test_hopper_skip.py tests/gpu/test_hopper.py -k '128-bf16 or (skip and 128 and bf16)' 2>&1 | grep -vi warn | tail -5)
