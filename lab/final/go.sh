#!/bin/bash
# go.sh COMMIT [OPTIONS of gpu_fleet.py...] : the final verification, from the root of the repository. OUT gets final.tar.xz.
# With several GPUs and .bundle/fa4.tar.xz carried, GPU 0 runs FA4's bench. FA3 takes part where /tmp/fa3.so is.
cd "$(dirname "$0")/../../.."; export ROOT=$PWD PYTHONUNBUFFERED=1; SECONDS=0; commit=$1; shift
out=/tmp/out; rm -rf $out; mkdir -p $out/fa4 $out/suite
[ -e /tmp/fa3.so ] || { [ -e .dev/q/fa3/fa3.so.xz ] && xz -dc .dev/q/fa3/fa3.so.xz > /tmp/fa3.so; }
# lib/csrc.sha says which source lib/full.so.xz is of: cd /work/main; find csrc -type f | LC_ALL=C sort | xargs sha256sum | sha256sum
sha=$(find csrc -type f | LC_ALL=C sort | xargs sha256sum | sha256sum); rm -f lite_attention/_C.abi3.so
if [ -n "$LIB_OK" ] || [ "$sha" = "$(cat .dev/q/lib/csrc.sha 2>/dev/null)" ]; then xz -dc .dev/q/lib/full.so.xz > lite_attention/_C.abi3.so
else echo "lib/full.so.xz is of another source, or has no csrc.sha: building"; fi
[ -e lite_attention/_C.abi3.so ] || bash .dev/q/kit/build.sh $PWD $PWD/lite_attention/_C.abi3.so > $out/build.log 2>&1
# setup.py's way to CUTLASS, for the planted bugs
mkdir -p /tmp/cutlass /tmp/site/cutlass_library/source; [ -d /tmp/cutlass/cute ] || tar -C /tmp/cutlass -xJf .dev/q/kit/cutlass.tar.xz
touch /tmp/site/cutlass_library/__init__.py; ln -sfn /tmp/cutlass /tmp/site/cutlass_library/source/include
command -v nvcc > /dev/null || export PATH=/usr/local/cuda/bin:$PATH
unset CUDA_HOME CUDA_PATH; export PYTHONPATH=$PWD:/tmp/site
n=$(nvidia-smi -L | wc -l); gpus=$(seq -s, 0 $((n - 1)))
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c; [ -e lite_attention/_C.abi3.so ] || { tail -40 $out/build.log; exit 1; }; echo "library after $SECONDS s"
if [ $n -gt 1 ] && [ -e .bundle/fa4.tar.xz ]; then
  gpus=$(seq -s, 1 $((n - 1)))
  (cd .dev/q/fa4; CUDA_VISIBLE_DEVICES=0 PYTHONPATH= COMMIT=$commit O=$out/fa4 END=${FA4_SECONDS:-$((540 - SECONDS < 330 ? 540 - SECONDS : 330))} bash go.sh > $out/fa4/log 2>&1) &
fi
parts=kernels,memcheck,racecheck,synccheck,two_gpus,planted
if [ -e /tmp/fa3.so ]; then export LITE_ATTENTION_FA3=/tmp/fa3.so; parts=errors,$parts; fi
python benchmarks/gpu_fleet.py $out/suite --commit $commit --gpus $gpus --parts $parts --seconds $((540 - SECONDS)) "$@" 2>&1 | tee $out/suite/log
wait; tail -n 70 $out/fa4/log 2>/dev/null | cut -c1-250
python benchmarks/gpu_suite.py table $(ls $out/suite/*.json | grep -v planted) | grep -vE '^$|^\|---' | cut -c1-200
tar -C $out --exclude=libraries -cJf $OUT/final.tar.xz . ; echo "all after $SECONDS s"; ls -la $OUT
