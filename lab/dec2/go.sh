#!/bin/bash
# build: 240
# seconds: 150
here=$PWD; fa3=/tmp/fa3.so
py() { (cd /tmp/dec2/$1; shift; PYTHONPATH=$PWD timeout 70 "$@"); }
py fullc python -m pytest -q -n 8 --maxfail 30 -p no:cacheprovider tests/gpu/test_hopper.py tests/gpu/test_hopper_pages.py tests/gpu/test_hopper_runtime.py -k "not 96 and not 192 and not 256 and not fp16 and not fp8 and not score_mod" 2>&1 | tail -40 | cut -c1-220
for l in traceb tracec; do echo "#### $l"; py $l python $here/trace.py /tmp/dec2/$l/lite_attention/_C.abi3.so decode-b1-8k decode-q8-b16-16k pages-step-b1-128k lists-1-128k-10; done
for l in base c; do echo "#### $l"; py $l python $here/prof.py pages-step-b1-128k pages-short-b64-4k 2>/dev/null; done
row() { for r in "$@"; do printf -- "--only %s " $r; done; }
echo "#### c"; py c python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions 10 --out $O/c $(row decode-b1-8k decode-b4-4k decode-b1-32k decode-hd64-b64-8k decode-q8-b16-16k decode-group16-b16-16k pages-step-b1-128k pages-step-b8-128k pages-short-b64-4k pages-random-10-b64-32k) 2>&1 | grep -v "^$" | tail -24 | cut -c1-220
echo "#### base"; py base python -m lite_attention.bench --peers fa3 --fa3 $fa3 --repetitions 10 --out $O/base $(row decode-b1-8k decode-b1-32k decode-hd64-b64-8k decode-q8-b16-16k pages-step-b1-128k pages-short-b64-4k) 2>&1 | grep -v "^$" | tail -20 | cut -c1-220
