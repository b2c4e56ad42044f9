#!/bin/bash
# dry3.sh DEADLINE [HANG [LATE]]: all calls of apart3 with stubs, ten times as fast. LATE: seconds before piece 8.
plan=apart3; export QUAD_LINK=/tmp/dl-$plan QUAD_BASE=/tmp/db-$plan QUAD_DRY=1 QUAD_QWEN=100 QUAD_ALL=200 QUAD_HANG=$2 OUT=/tmp/do-$plan
rm -rf $QUAD_LINK $QUAD_BASE $OUT /tmp/dr-$plan; mkdir -p $OUT
R=/tmp/dr-$plan; mkdir -p $R/.dev/q/lib $R/.dev/q/kit $R/.bundle $R/.dev/q/quad/up $R/.dev/q/quad/pl
cp -r /work/main/{lite_attention,vllm_plugin,tests,tools,docs,examples,csrc,setup.py,README.md,pyproject.toml} $R/; mkdir $R/benchmarks; cp /work/main/benchmarks/*.py $R/benchmarks/
cp -r /work/main/.dev/q/quad/s $R/.dev/q/quad/; echo x | xz > $R/.dev/q/lib/full.so.xz; (mkdir -p /tmp/empty; tar -C /tmp/empty -cJf $R/.dev/q/kit/cutlass.tar.xz .); echo > $R/.bundle/vllm.tar.xz
for n in 1 2 3 4 5 6 7 8; do mkdir -p $R/.dev/q/quad/up/p$n; s=12; [ $n = 8 ] && s=20; head -c $s /dev/zero > $R/.dev/q/quad/up/p$n/piece0$n; done
for f in /work/main/.dev/q/quad/pl/*.so.xz; do echo x | xz > $R/.dev/q/quad/pl/$(basename $f); done
mkdir -p /tmp/drybin; printf '#!/bin/bash\ncase "$*" in *index,name*) echo "0, NVIDIA H200, 143771";; *) true;; esac\n' > /tmp/drybin/nvidia-smi; chmod +x /tmp/drybin/nvidia-smi; export PATH=/tmp/drybin:$PATH
cd $R; t0=$(date +%s)
DRIVER_OPTIONS="--stub --scale 10 $plan" COMMIT=7aef596 DEADLINE=$1 bash .dev/q/quad/s/begin.sh > $OUT.log 2>&1
for n in 2 3 4 5 6 7 8; do [ $n = 8 ] && sleep ${3:-0}; sleep 0.5; bash $QUAD_BASE/s/put.sh $n >> $OUT.log 2>&1; done
bash $QUAD_BASE/s/putpl.sh >> $OUT.log 2>&1
bash $QUAD_BASE/s/look.sh 30 >> $OUT.log 2>&1; echo "look at $(( $(date +%s)-t0 )): $(ls $OUT)"
bash $QUAD_BASE/s/last.sh 60 >> $OUT.log 2>&1; echo "last at $(( $(date +%s)-t0 )): $(ls $OUT)"; grep -n "planted:\|BAD\|NO " $OUT.log; cat $QUAD_BASE/results/driver.log | grep -v '^\[.*\]   '
