#!/bin/bash
# Starts the driver where none runs. It goes on from what one before it has left.
source "$(dirname "$0")/env.sh"
cat > $BASE/supervise.sh <<'Y'
exec 9> $BASE/lock; flock -n 9 || exit 0
[ -e $BASE/done ] && exit 0
nvidia-smi --query-gpu=timestamp,index,utilization.gpu,memory.used,clocks.sm,power.draw --format=csv,noheader,nounits -l 4 >> $BASE/results/gpus.txt 2>&1 9>&- &
smi=$!
nvidia-smi topo -m > $BASE/results/topo.txt 2>&1
for i in 1 2 3; do
  [ -e $BASE/done ] && break
  PYTHONPATH=$PYTHONPATH:$BASE/s python $BASE/s/driver.py $(cat $BASE/options) --base $BASE >> $BASE/driver.out 2>&1 9>&-; sleep 1
done
kill $smi 2> /dev/null; true
Y
cd $BASE; setsid nohup bash $BASE/supervise.sh > $BASE/supervise.log 2>&1 < /dev/null &
sleep 0.2
