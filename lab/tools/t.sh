# t.sh TREE NAME HD KIND: compile one, hot path
T=/work/wt/lab/lab/tools; n=x_$2
cat > $1/csrc/sm90/instances/$n.cu <<X
#include "sm90/fwd.cuh"
namespace lite_attention::sm90 {
template Kernel make_kernel<cutlass::bfloat16_t, $3, TileKind::$4, ${5:-false}>();
}
X
bash $T/h.sh $1 $n /tmp/cmp/$2.o 2>&1 | grep -E "error|C75"; rm $1/csrc/sm90/instances/$n.cu
python3 $T/hot.py /tmp/cmp/$2.o 1 | cut -c1-700; python3 $T/inner.py /tmp/cmp/$2.o | grep -o "all.*"
