#!/bin/bash
# putpl.sh: takes libraries with planted bugs, which this call carried in .dev/q/quad/pl; sees that the driver runs. pl/whole says all are there.
source "$(dirname "$0")/env.sh"
mkdir -p $BASE/pl; n=0; bad=0
for f in .dev/q/quad/pl/*.so.xz; do
  cp $f $BASE/pl/.tmp && { [ -n "$QUAD_DRY" ] || xz -t $BASE/pl/.tmp; } && mv $BASE/pl/.tmp $BASE/pl/$(basename $f) && n=$((n + 1)) || { echo "BAD $f"; bad=1; }
done
rm -f $BASE/pl/.tmp
[ -e $BASE/pl/sound.so.xz ] && [ $bad = 0 ] && echo $n > $BASE/pl/whole
echo "planted: $n libraries, $(($(date +%s) - $(cat $BASE/t0))) s"
bash $BASE/s/look.sh 0
