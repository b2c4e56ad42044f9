# try.sh TREE NAME HD KIND PATTERN : compiles one kernel, prints its loop and clocks
T=$(cd "$(dirname "$0")" && pwd); mkdir -p /tmp/cmp
export PATH=/work/main/.venv/cpu-0.32/lib/python3.11/site-packages/triton/backends/nvidia/bin:$PATH
n=x_$2; cat > $1/csrc/sm90/instances/$n.cu <<X
#include "sm90/fwd.cuh"
namespace lite_attention::sm90 {
template Kernel make_kernel<cutlass::bfloat16_t, $3, TileKind::$4, false>();
}
X
bash $T/h.sh $1 $n /tmp/cmp/$2.o 2>&1 | grep -E "error|ptxas" ; rm $1/csrc/sm90/instances/$n.cu
python3 $T/inner.py /tmp/cmp/$2.o
python3 $T/step.py /tmp/cmp/$2.o fwd_kernel > /tmp/cmp/$2.txt; for l in 18 24 30; do python3 $T/clk.py /tmp/cmp/$2.txt $l; done
