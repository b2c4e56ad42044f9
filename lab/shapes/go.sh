#!/bin/bash
# seconds: 150
# The example at two sizes: trained, then sampled at thresholds. Output: numbers, skip bits, pictures.
set -e
d=/tmp/shapes; mkdir -p $d; cp -r $ROOT/lite_attention $ROOT/examples $d/; cp go.py $d/
if [ -e lib.so.xz ]; then xz -dc lib.so.xz > $d/lite_attention/_C.abi3.so; fi
cd $d; export PYTHONPATH=$d:$d/examples PYTHONUNBUFFERED=1
python go.py $O
