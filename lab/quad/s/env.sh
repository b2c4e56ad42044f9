# Where everything is. Memory where there is room: its files need no disk. Chosen once, by the first call.
LINK=${QUAD_LINK:-/tmp/serve}
if [ -e $LINK/. ]; then BASE=$(readlink -f $LINK)
else
  free=$(df --output=avail -m /dev/shm | tail -1)
  if [ -n "$QUAD_BASE" ]; then BASE=$QUAD_BASE; elif [ "${free:-0}" -gt 12000 ]; then BASE=/dev/shm/serve; else BASE=/tmp/serve.d; fi
fi
export BASE PYTHONPATH=$BASE/repo:$BASE/site PYTHONUNBUFFERED=1
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0
command -v nvcc > /dev/null && command -v compute-sanitizer > /dev/null || export PATH=$PATH:/usr/local/cuda/bin
unset CUDA_HOME CUDA_PATH
mkdir -p $BASE
