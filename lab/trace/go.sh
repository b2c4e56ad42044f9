#!/bin/bash
# build: 90
# seconds: 40
here=$PWD; nvidia-smi --query-gpu=name,clocks.sm --format=csv,noheader
for n in 3 6; do echo "#### asked $n tiles ahead"; (cd /tmp/trace/$n; PYTHONPATH=$PWD timeout 40 python $here/trace.py 16 2>&1 | tail -60); done
