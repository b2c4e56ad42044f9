#!/bin/bash
# put.sh N: takes piece N, which this call carried; converts a model once its file is whole; sees that the driver runs.
source "$(dirname "$0")/env.sh"; n=$1; shopt -s nullglob
for f in .dev/q/quad/up/p$n/piece*; do
  case $f in *.xz) xz -dc -T0 $f > $BASE/pieces/.tmp && mv $BASE/pieces/.tmp $BASE/pieces/$(basename $f .xz);;
    *) cp $f $BASE/pieces/.tmp && mv $BASE/pieces/.tmp $BASE/pieces/$(basename $f);; esac
done
QWEN=${QUAD_QWEN:-397804864}; ALL=${QUAD_ALL:-496167296}
# In their order, without a gap: what is there of the beginning.
have=0; for i in 1 2 3 4 5 6 7 8 9; do f=$BASE/pieces/piece0$i; [ -e $f ] || break; have=$((have + $(stat -c %s $f))); done
echo "piece $n: $(ls $BASE/pieces | wc -l) pieces, $have bytes of the beginning, $(($(date +%s) - $(cat $BASE/t0))) s; $(tail -n 1 $BASE/warm.log)"
convert() { # FROM COUNT NAME
  cat > $BASE/convert-$3.sh <<Y
until [ -e $BASE/prepared ]; do sleep 0.3; done
cat $BASE/pieces/piece0* | tail -c +$(($1+1)) | head -c $2 > $BASE/$3.gguf; sha256sum $BASE/$3.gguf; grep $3 $BASE/s/sums
if [ -n "$QUAD_DRY" ]; then sleep 1; mkdir -p $BASE/models/tmp-$3; touch $BASE/models/tmp-$3/config.json
else PYTHONPATH=$BASE/gguf_lib python $BASE/gguf2hf.py $BASE/$3.gguf $BASE/models/tmp-$3 bfloat16; fi && mv $BASE/models/tmp-$3 $BASE/models/$3
echo "converted after \$((\$(date +%s) - $(cat $BASE/t0))) s"
Y
  [ -e $BASE/convert-$3.log ] || { setsid nohup bash $BASE/convert-$3.sh > $BASE/convert-$3.log 2>&1 < /dev/null & }
}
[ $have -ge $QWEN ] && convert 0 $QWEN Qwen2.5-Coder-0.5B-Instruct
[ $have -ge $ALL ] && convert $QWEN $((ALL-QWEN)) SmolLM2-135M-Instruct
bash $BASE/s/look.sh 0
