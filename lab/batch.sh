#!/bin/bash
# batch.sh NAME... : runs all requests' build.sh at once, then each go.sh alone, each with its own limit; tars what each wrote.
cd "$(dirname "$0")/../.."; export ROOT=$PWD
export LITE_ATTENTION_FA3=/tmp/fa3.so
[ -e /tmp/fa3.so ] || { [ -e .dev/q/fa3/fa3.so.xz ] && xz -dc .dev/q/fa3/fa3.so.xz > /tmp/fa3.so; }
t=$(date +%s); nvidia-smi --query-gpu=name --format=csv,noheader
for n in "$@"; do d=.dev/q/$n; mkdir -p /tmp/out/$n
  if [ -e $d/build.sh ]; then s=$(sed -n 's/^# build: *//p' $d/go.sh | head -1); ( cd $d; O=/tmp/out/$n timeout -k 5 ${s:-180} bash build.sh > /tmp/out/$n/build.log 2>&1; echo "build of $n: rc $?" ) & fi
done; for n in $BG; do d=.dev/q/$n; mkdir -p /tmp/out/$n; s=$(sed -n 's/^# seconds: *//p' $d/go.sh | head -1)
  ( cd $d; O=/tmp/out/$n timeout -k 5 ${s:-30} bash go.sh > /tmp/out/$n/log 2>&1; echo "rc $? (beside the builds)" >> /tmp/out/$n/log ) & done
wait; for n in $BG; do echo "== $n"; tail -${TAIL:-12} /tmp/out/$n/log | cut -c1-200; tar -C /tmp/out -cJf $OUT/$n.tar.xz $n; done; echo "built after $(( $(date +%s)-t )) s"
for n in "$@"; do
  d=.dev/q/$n; s=$(sed -n 's/^# seconds: *//p' $d/go.sh | head -1); export O=/tmp/out/$n
  t0=$(date +%s); ( cd $d && timeout -k 5 ${s:-30} bash go.sh > $O/log 2>&1; echo "rc $? after $(( $(date +%s)-t0 )) s" >> $O/log )
  echo "== $n: $(tail -1 $O/log)"; tail -${TAIL:-12} $O/log | cut -c1-200
  tar -C /tmp/out -cJf $OUT/$n.tar.xz $n
done
