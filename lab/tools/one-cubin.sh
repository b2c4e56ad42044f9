# go.sh TREE OUT
F="-std=c++17 -O3 -DNDEBUG -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr --expt-extended-lambda -DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED -DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA -Xcompiler=-fPIC,-fvisibility=hidden --threads 1 -isystem /opt/venv/lib/python3.11/site-packages/torch/include -isystem /opt/venv/lib/python3.11/site-packages/cutlass_library/source/include"
nvcc $F -I$1/csrc -lineinfo -cubin -o $2 /tmp/one/x.cu
