#!/bin/bash
# look.sh SECONDS: sees that the driver runs, waits so long, says how things stand; $OUT gets what there is so far.
source "$(dirname "$0")/env.sh"; until=$(($(date +%s) + ${1:-0}))
bash $BASE/s/start.sh
while [ $(date +%s) -lt $until ] && [ ! -e $BASE/done ]; do
  sleep 5; [ -z "$OUT" ] || cp -u $BASE/partial/* $OUT/ 2> /dev/null
done
grep -hE "Error|error|No such|NO " $BASE/prepare.log $BASE/warm.log $BASE/convert-*.log 2> /dev/null | tail -n 5
tail -n ${LINES_OF_LOG:-12} $BASE/results/driver.log 2> /dev/null | cut -c1-230
[ -z "$OUT" ] || { rm -f $OUT/*; cp $BASE/partial/* $OUT/ 2> /dev/null; }
true
