#!/bin/bash
# All of NEW; of BASE what is timed; h3: NEW with three stages for decode at head dim 64. The library of NEW comes back.
cd "$(dirname "$0")"; ROOT=${ROOT:-$(cd ../../..; pwd)}
for l in new base h3 p160; do rm -rf /tmp/next/$l; mkdir -p /tmp/next/$l; tar -C /tmp/next/$l -xJf $([ $l = base ] && echo base || echo new).tar.xz; done
sed -i 's/TileShape<64, TileKind::kDecode> : Shape<64, 128, 5>/TileShape<64, TileKind::kDecode> : Shape<64, 128, 3>/' /tmp/next/h3/csrc/sm90/traits.cuh
sed -i 's/TileKind::kPaged> : Shape<128, 128, 3>/TileKind::kPaged> : Shape<128, 160, 2>/;s/TileShape<128, TileKind::kDecode> : Shape<64, 128, 2>/TileShape<128, TileKind::kDecode> : Shape<64, 160, 2>/' /tmp/next/p160/csrc/sm90/traits.cuh
# scheduler_metadata_size asks for kernels that a library of few has not
for l in base h3 p160; do sed -i 's/{sm90::KeyType::kAsQueries, sm90::KeyType::kE4M3, sm90::KeyType::kE4M3Queries}/{sm90::KeyType::kAsQueries}/' /tmp/next/$l/csrc/ops.cu; done
kit() { local l=$1 j=$2; shift 2; JOBS=$j bash $ROOT/.dev/q/kit/build.sh /tmp/next/$l /tmp/next/$l.so "$@" > /tmp/next/$l.log 2>&1; cp /tmp/next/$l.so /tmp/next/$l/lite_attention/_C.abi3.so; tail -1 /tmp/next/$l.log; }
kit new 12 & kit base 3 hd64_bf16 hd128_bf16 hd256_bf16 & kit h3 1 hd64_bf16 & kit p160 1 hd128_bf16 & wait
xz -3 -T16 -c /tmp/next/new.so > $O/../new.so.xz
