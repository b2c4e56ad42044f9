#!/bin/bash
# last.sh SECONDS: waits until all has ended, at most so long, and leaves the deadline as it is. $OUT gets everything, or what there is so far.
source "$(dirname "$0")/env.sh"; until=$(($(date +%s) + ${1:-500})); told=$(date +%s)
bash $BASE/s/start.sh
while [ ! -e $BASE/done ] && [ $(date +%s) -lt $until ]; do
  sleep 2; cp -u $BASE/partial/* $OUT/ 2> /dev/null
  if [ $(($(date +%s) - told)) -ge 100 ]; then told=$(date +%s); echo "$((told - $(cat $BASE/t0))) s: $(grep -c END $BASE/results/driver.log) ended"; fi
done
rm -f $OUT/*
if [ -e $BASE/done ]; then cp $BASE/final/* $OUT/; else echo "NOT DONE YET"; cp $BASE/partial/* $OUT/; fi
tail -n ${LINES_OF_LOG:-40} $BASE/results/driver.log | cut -c1-220; ls -la $OUT
