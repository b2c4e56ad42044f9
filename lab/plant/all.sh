cd /tmp/plant
# objects of the sound library, to be sure of the state: relink
mkdir -p sound; cp -r src/csrc sound/ 2>/dev/null
bash build.sh one sound; cmp sound/sound.so sound.so && echo RELINK SAME
while read n t k; do echo "$n $k"; done < list.txt | nice -n 10 xargs -P 2 -L 1 bash build.sh one
