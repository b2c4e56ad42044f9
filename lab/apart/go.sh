#!/bin/bash
# seconds: 200
for v in ${VS:-old new}; do xz -dc $v.so.xz > /tmp/$v.so; cp /tmp/$v.so $ROOT/lite_attention/_C.abi3.so; echo "## $v"
( cd $ROOT; ONLY="${ROWS:-pages-step-b1-128k pages-step-b8-128k pages-step-b64-32k qwen-b128-28k}" PYTHONPATH=$PWD timeout 60 python .dev/q/steps/steps.py 2>&1 | grep -v -i warn ); done
