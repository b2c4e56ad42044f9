#!/bin/bash
# one.sh COMMIT : suite, layouts, the bench's decode part. Library: .dev/q/f1/lib.so.xz
cd "$(dirname "$0")/../../.."; export PYTHONUNBUFFERED=1 SECONDS=0 V=/tmp/f1; mkdir -p $V/repo $V/out
cp -r lite_attention vllm_plugin tests benchmarks csrc setup.py pyproject.toml README.md .dev $V/repo/; cd $V/repo; export PYTHONPATH=$PWD
xz -dc .dev/q/f1/lib.so.xz > lite_attention/_C.abi3.so; xz -dc .dev/q/fa3/fa3.so.xz > /tmp/fa3.so; nvidia-smi --query-gpu=name --format=csv,noheader
timeout 190 python benchmarks/gpu_suite.py run kernels -n 14 --commit $1 --out $V/out > $V/kernels.log 2>&1; echo "suite: rc $? after $SECONDS s"; grep -E "^(FAILED|ERROR)|passed|failed" $V/kernels.log | cut -c1-180 | tail -25
timeout 45 python .dev/q/layout/layout.py 2>&1 | tail -5; echo "layout after $SECONDS s"
timeout 150 python -m lite_attention.bench --peers fa3 --fa3 /tmp/fa3.so --repetitions 20 --commit $1 --out $V/decode --only 'decode-*' --only 'mixed*' --only 'prefill*' --only 'pages-*' --only 'fp8-*' --only 'varlen*' > $V/decode.log 2>&1; echo "bench: rc $? after $SECONDS s"
grep -E "; (meets|below|no target)|wrong|rror" $V/decode.log | cut -c1-150 | tail -50
tar -C $V -cJf $OUT/one.tar.xz out decode decode.log kernels.log
