#!/bin/bash
# prepare.sh COMMIT : in /work/main, packs a commit with the clocks in it. Compile here once to see that it spills no more than without.
cd "$(dirname "$0")"; here=$PWD; t=$(mktemp -d); git -C /work/main archive $1 csrc lite_attention setup.py pyproject.toml | tar -C $t -x; python3 patch.py $t; tar -C $t -c csrc lite_attention | xz -6 > $here/trace.tar.xz; git -C /work/main rev-parse --short $1 > commit; rm -r $t; ls -la
