#!/bin/bash
# First call: takes the scripts, the library and the first piece, and prepares in the background while others travel.
cd "$(dirname "$0")"; here=$PWD; export ROOT=$(cd ../../..; pwd); source ./env.sh
ln -sfn $BASE /tmp/serve; mkdir -p $BASE/{big,pieces}; cp -r . $BASE/big/; cp begin.sh put.sh run.sh $BASE/
echo "${COMMIT:-unknown}" > $BASE/commit
[ -e lib.so.xz ] || [ -e $ROOT/lite_attention/_C.abi3.so ] || { echo "NO LIBRARY: lib.so.xz here, or lite_attention/_C.abi3.so"; exit 2; }
nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader; nproc; free -g | head -2; df -h /tmp /dev/shm | cat; echo BASE $BASE
setsid nohup bash $BASE/big/warm.sh > $BASE/warm.log 2>&1 < /dev/null &
setsid nohup bash -c "cd $BASE/big && xz -dc texts.tar.xz | tar -xf - && bash prepare.sh $BASE/big && touch $BASE/prepared" > $BASE/prepare.log 2>&1 < /dev/null &
(cd $ROOT && bash $BASE/put.sh 1)
# The repository's copy is overwritten by the next call: wait until it has been taken.
for i in $(seq 40); do [ -e $BASE/site/vllm/__init__.py ] && break; sleep 0.5; done; ls $BASE/repo | tr '\n' ' '; cat $BASE/prepare.log
