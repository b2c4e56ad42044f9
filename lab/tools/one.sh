# one.sh WORKTREE OUT HD KIND
cat > $1/csrc/sm90/instances/x_one.cu <<X
#include "sm90/fwd.cuh"
namespace lite_attention::sm90 {
template Kernel make_kernel<cutlass::bfloat16_t, $3, TileKind::$4, false>();
}
X
bash /tmp/sass/h.sh $1 x_one $2; rm $1/csrc/sm90/instances/x_one.cu
