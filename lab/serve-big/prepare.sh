#!/bin/bash
# prepare.sh FOLDER: vLLM, the package and the texts under $BASE, from the repository at $ROOT and this folder.
set -e
here=$1; mkdir -p $BASE/{repo,site,models,cache,results}
cp -r $ROOT/{lite_attention,vllm_plugin,tests,benchmarks,tools,docs,examples,README.md,pyproject.toml} $BASE/repo/
[ ! -e $here/overlay.tar ] || python $here/apply_overlay.py $here/overlay.tar $BASE/repo
if [ -e $here/lib.so.xz ]; then xz -dc $here/lib.so.xz > $BASE/repo/lite_attention/_C.abi3.so; fi
cp -r $here/texts $here/gguf_lib $here/gguf2hf.py $BASE/
d=$BASE/site/lite_attention-0.1.0.dist-info; mkdir -p $d
printf 'Metadata-Version: 2.1\nName: lite-attention\nVersion: 0.1.0\n' > $d/METADATA
cat > $d/entry_points.txt <<'X'
[vllm.platform_plugins]
lite_attention = vllm_plugin.register:platform_plugin

[vllm.general_plugins]
lite_attention = vllm_plugin.register:general_plugin
X
tar -C $BASE/site -xJf $ROOT/.bundle/vllm.tar.xz
