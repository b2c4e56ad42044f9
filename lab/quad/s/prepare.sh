#!/bin/bash
# prepare.sh: vLLM, the package, the texts and CUTLASS under $BASE. $BASE/prepared says it is done, $BASE/kernels that the
# package alone is.
set -e
cd $BASE/s; mkdir -p $BASE/cutlass $BASE/build-site/cutlass_library/source
rm -f $BASE/repo/lite_attention/_C.abi3.so; xz -dc $BASE/in/full.so.xz > $BASE/repo/lite_attention/_C.abi3.so
# setup.py's way to CUTLASS, for the planted bugs, and `python -m ninja`
tar -C $BASE/cutlass -xJf $BASE/in/cutlass.tar.xz; touch $BASE/build-site/cutlass_library/__init__.py
ln -sfn $BASE/cutlass $BASE/build-site/cutlass_library/source/include
if ! python -c 'import ninja' 2> /dev/null; then
  mkdir -p $BASE/build-site/ninja; touch $BASE/build-site/ninja/__init__.py
  echo 'import os, sys; os.execvp("ninja", ["ninja", *sys.argv[1:]])' > $BASE/build-site/ninja/__main__.py
fi
touch $BASE/kernels
[ -z "$QUAD_DRY" ] || { sleep 1; touch $BASE/prepared; exit; }
tar -C $BASE -xJf texts.tar.xz; cp -r gguf_lib gguf2hf.py $BASE/
d=$BASE/site/lite_attention-0.1.0.dist-info; mkdir -p $d
printf 'Metadata-Version: 2.1\nName: lite-attention\nVersion: 0.1.0\n' > $d/METADATA
cat > $d/entry_points.txt <<'Y'
[vllm.platform_plugins]
lite_attention = vllm_plugin.register:platform_plugin

[vllm.general_plugins]
lite_attention = vllm_plugin.register:general_plugin
Y
tar -C $BASE/site -xJf $BASE/in/vllm.tar.xz
ls $BASE/texts $BASE/repo | tr '\n' ' '; touch $BASE/prepared
