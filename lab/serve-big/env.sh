# Where everything is. Memory where there is room: its files need no disk.
free=$(df --output=avail -m /dev/shm | tail -1)
[ "${free:-0}" -gt 12000 ] && BASE=/dev/shm/serve || BASE=/tmp/serve
export BASE PYTHONPATH=$BASE/repo:$BASE/site PYTHONUNBUFFERED=1
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0
mkdir -p $BASE
