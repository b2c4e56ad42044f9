#!/bin/bash
# pbatch.sh NAME... : like batch.sh, but the i-th request runs on GPU i, all side by side. NAME+NAME: one after the other on one GPU.
cd "$(dirname "$0")/../.."; export ROOT=$PWD LITE_ATTENTION_FA3=/tmp/fa3.so
[ -e /tmp/fa3.so ] || { [ -e .dev/q/fa3/fa3.so.xz ] && xz -dc .dev/q/fa3/fa3.so.xz > /tmp/fa3.so; }
t=$(date +%s); nvidia-smi --query-gpu=name --format=csv,noheader
for n in ${*//+/ }; do d=.dev/q/$n; mkdir -p /tmp/out/$n
  if [ -e $d/build.sh ]; then s=$(sed -n 's/^# build: *//p' $d/go.sh | head -1); ( cd $d; O=/tmp/out/$n timeout -k 5 ${s:-180} bash build.sh > /tmp/out/$n/build.log 2>&1; echo "build of $n: rc $? after $(( $(date +%s)-t )) s" ) & fi
done; wait; echo "built after $(( $(date +%s)-t )) s"
i=0
for g in "$@"; do ( export CUDA_VISIBLE_DEVICES=$i
  for n in ${g//+/ }; do d=.dev/q/$n; s=$(sed -n 's/^# seconds: *//p' $d/go.sh | head -1); export O=/tmp/out/$n
  t0=$(date +%s); ( cd $d && timeout -k 5 ${s:-30} bash go.sh > $O/log 2>&1; echo "rc $? after $(( $(date +%s)-t0 )) s" >> $O/log ); tar -C /tmp/out -cJf $OUT/$n.tar.xz $n; done ) & i=$((i+1)); done; wait
for n in ${*//+/ }; do echo "== $n: $(tail -1 /tmp/out/$n/log)"; tail -${TAIL:-12} /tmp/out/$n/log | cut -c1-200; done
