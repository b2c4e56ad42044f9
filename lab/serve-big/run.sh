#!/bin/bash
# Last call: all jobs. Needs OUT, where what comes back goes. run.sh [DEADLINE [PLAN]]
BASE=$(readlink -f /tmp/serve); cd $BASE/big; source ./env.sh; export O=$OUT
while [ ! -e $BASE/warm ] && [ $SECONDS -lt 60 ]; do sleep 0.5; done; echo "started after $SECONDS s"
cat $BASE/warm.log $BASE/prepare.log $BASE/convert-*.log; ls -la $BASE/repo/lite_attention/*.so $BASE/models
nvidia-smi --query-gpu=timestamp,index,utilization.gpu,memory.used,clocks.sm,power.draw --format=csv,noheader,nounits -l 4 > $BASE/results/gpus.txt 2>&1 &
smi=$!; nvidia-smi topo -m > $BASE/results/topo.txt 2>&1
PYTHONPATH=$PYTHONPATH:$BASE/big python driver.py ${2:-big} --base $BASE --out $OUT --deadline $((${1:-430}-SECONDS)) --commit "$(cat $BASE/commit)" | tee $OUT/driver.log
kill $smi
cp $BASE/results/driver.log $OUT/driver.log; ls -la $OUT
