#!/bin/bash
# put.sh N: takes piece N, which this call carried; converts a model once its file is whole.
BASE=$(readlink -f /tmp/serve); n=$1; shopt -s nullglob
for f in .dev/q/serve-up/p$n/piece*; do mv $f $BASE/pieces/; done
QWEN=397804864; ALL=496167296
have=$(cat $BASE/pieces/piece* 2>/dev/null | wc -c); echo "piece $n: $(ls $BASE/pieces | wc -l) pieces, $have bytes; $(tail -1 $BASE/warm.log)"
convert() { # FROM COUNT NAME
  cat > $BASE/convert-$3.sh <<X
until [ -e $BASE/prepared ]; do sleep 0.3; done
cat $BASE/pieces/piece* | tail -c +$(($1+1)) | head -c $2 > $BASE/$3.gguf; sha256sum $BASE/$3.gguf
PYTHONPATH=$BASE/gguf_lib python $BASE/gguf2hf.py $BASE/$3.gguf $BASE/models/tmp-$3 bfloat16 && mv $BASE/models/tmp-$3 $BASE/models/$3
X
  [ -e $BASE/convert-$3.log ] || { setsid nohup bash $BASE/convert-$3.sh > $BASE/convert-$3.log 2>&1 < /dev/null & }
}
[ $have -ge $QWEN ] && convert 0 $QWEN Qwen2.5-Coder-0.5B-Instruct
[ $have -ge $ALL ] && convert $QWEN $((ALL-QWEN)) SmolLM2-135M-Instruct
true
