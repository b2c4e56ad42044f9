#!/bin/bash
# seconds: 120
xz -dc lib.so.xz > $ROOT/lite_attention/_C.abi3.so; cd $ROOT; PYTHONPATH=$PWD timeout 110 python .dev/q/cold/cold.py
