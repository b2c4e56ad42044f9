#!/bin/bash
# dry.sh PLAN DEADLINE HANG : all calls with stubs, ten times as fast
plan=$1; export QUAD_LINK=/tmp/dl-$plan QUAD_BASE=/tmp/db-$plan QUAD_DRY=1 QUAD_QWEN=100 QUAD_ALL=200 QUAD_HANG=$3 OUT=/tmp/do-$plan
rm -rf $QUAD_LINK $QUAD_BASE $OUT /tmp/dr-$plan; mkdir -p $OUT /tmp/dr-$plan
# a root with small things in place of the large ones
R=/tmp/dr-$plan; mkdir -p $R/.dev/q/lib $R/.dev/q/kit $R/.bundle $R/.dev/q/quad/up
cp -r /work/main/{lite_attention,vllm_plugin,tests,tools,docs,examples,csrc,setup.py,README.md,pyproject.toml} $R/; mkdir $R/benchmarks; cp /work/main/benchmarks/*.py $R/benchmarks/
cp -r /work/main/.dev/q/quad/s $R/.dev/q/quad/; echo x | xz > $R/.dev/q/lib/full.so.xz; (mkdir -p /tmp/empty; tar -C /tmp/empty -cJf $R/.dev/q/kit/cutlass.tar.xz .); echo > $R/.bundle/vllm.tar.xz
for n in 1 2 3 4 5 6 7 8 9; do mkdir -p $R/.dev/q/quad/up/p$n; s=12; [ $n = 8 ] && s=20; [ $n = 9 ] && s=96; head -c $s /dev/zero > $R/.dev/q/quad/up/p$n/piece0$n; done
mkdir -p /tmp/drybin; printf '#!/bin/bash\ncase "$*" in *index,name*) echo "0, NVIDIA H200, 143771";; *) true;; esac\n' > /tmp/drybin/nvidia-smi; chmod +x /tmp/drybin/nvidia-smi; export PATH=/tmp/drybin:$PATH
cd $R; t0=$(date +%s)
DRIVER_OPTIONS="--stub --scale 10 $plan" COMMIT=abc DEADLINE=$2 bash .dev/q/quad/s/begin.sh > $OUT.log 2>&1
for n in 2 3 4 5 6 7 8 $4; do sleep 0.5; bash $QUAD_BASE/s/put.sh $n >> $OUT.log 2>&1; done
for i in 1 2; do bash $QUAD_BASE/s/look.sh $5 >> $OUT.log 2>&1; echo "look $i at $(( $(date +%s)-t0 )): $(ls $OUT)"; done
bash $QUAD_BASE/s/last.sh 60 >> $OUT.log 2>&1; echo "last at $(( $(date +%s)-t0 )): $(ls $OUT)"; tail -30 $OUT.log
