# pages.sh: build pages objects from /work/main and link with the sm90 objects that are there
export PATH=/work/tools:/opt/venv/bin:$PATH
cd /work/wt/build
for f in $(cd /work/main && git ls-files csrc setup.py); do cmp -s /work/main/$f $f || { cp /work/main/$f $f; echo $f; }; done
F=$(sed -n 's/^flags = //p' build/kernels/build.ninja)
one() { nvcc $F -c csrc/$1.cu -o build/kernels/csrc/$1.cu.o || echo FAILED $1; }
export -f one; export F
echo "$@" | tr ' ' '\n' | xargs -P 2 -I{} bash -c 'one {}'
L=$(sed -n 's/^ldflags = //p' build/kernels/build.ninja)
O=$(grep "^build build/kernels/_C" build/kernels/build.ninja | tr ' ' '\n' | grep "\.o$")
nvcc $O -o build/kernels/_C.abi3.so $L && xz -6 -T2 -c build/kernels/_C.abi3.so > /work/main/.dev/q/lib/full.so.xz && ls -l build/kernels/_C.abi3.so /work/main/.dev/q/lib/full.so.xz
