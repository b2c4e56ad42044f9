#!/bin/bash
# run.sh SECONDS: last call. All ends that many seconds from now at the latest, sooner where all has run; $OUT gets everything.
source "$(dirname "$0")/env.sh"; n=${1:-400}
echo $(($(date +%s) + n)) > $BASE/deadline; bash $BASE/s/start.sh
told=0
while [ ! -e $BASE/done ] && [ $SECONDS -lt $((n + 35)) ]; do
  sleep 2; cp -u $BASE/partial/* $OUT/ 2> /dev/null
  if [ $((SECONDS - told)) -ge 60 ]; then told=$SECONDS; echo "$SECONDS s: $(grep -cE 'END' $BASE/results/driver.log) ended"; fi
done
if [ -e $BASE/done ]; then rm -f $OUT/*; cp $BASE/final/* $OUT/
else echo "THE DRIVER DID NOT END: $(tail -n 5 $BASE/driver.out)"; cp $BASE/partial/* $OUT/; tar -C $BASE -cf - results/logs results/driver.log | xz -1 > $OUT/logs.tar.xz; fi
cat $BASE/warm.log $BASE/prepare.log $BASE/convert-*.log $BASE/supervise.log 2> /dev/null | grep -v "^INFO" | tail -n 25 | cut -c1-200
tail -n 60 $BASE/results/driver.log | cut -c1-200; ls -la $OUT
