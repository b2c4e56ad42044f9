#!/bin/bash
# Reads what imports read, and has Python compile it, before many processes do so at once. $BASE/warm says it is done.
t0=$SECONDS
lib=$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
( find $lib/torch/lib $lib/nvidia $lib/triton -name '*.so*' -type f -print0 | xargs -0 -P 8 -n 4 cat > /dev/null 2>&1; echo "libraries read after $((SECONDS-t0)) s" ) &
python -c 'import torch, transformers; torch.zeros(1, device="cuda")'; echo "torch after $((SECONDS-t0)) s"
wait
until [ -e $BASE/site/vllm/__init__.py ] && [ -e $BASE/prepared ]; do sleep 0.5; done
echo "prepared after $((SECONDS-t0)) s"
cd $BASE/repo
one() { VLLM_CACHE_ROOT=$BASE/cache/warm python -c "$1" 2>&1 | tail -1; echo "$2 after $((SECONDS-t0)) s"; }
inspect() { one "from vllm.model_executor.models.registry import ModelRegistry as r; print(r.models['$1'].inspect_model_cls().architecture)" $1; }
inspect LlamaForCausalLM & inspect Qwen2ForCausalLM &
one '
import vllm.v1.engine.core, vllm.entrypoints.openai.api_server, vllm.v1.worker.gpu_worker
from vllm import LLM
import vllm_plugin.impl, lite_attention, triton
print(lite_attention.__file__, vllm.__version__)' vllm &
wait; ls $BASE/cache/warm/modelinfos
touch $BASE/warm
