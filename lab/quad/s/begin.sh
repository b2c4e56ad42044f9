#!/bin/bash
# First call: COMMIT=hash [DEADLINE=seconds] [SKIP=job,job] begin.sh . Takes all that this call carried, prepares in the
# background, starts the driver. DEADLINE: when all ends, from now; run.sh may change it. SKIP: what another machine did.
cd "$(dirname "$0")"; export ROOT=$(cd ../../../..; pwd); source ./env.sh
[ "$BASE" = "$(readlink -f $LINK)" ] || ln -sfn $BASE $LINK
mkdir -p $BASE/{s,in,pieces,repo,site,models,cache,results,partial,t,planted}
now=$(date +%s); echo $now > $BASE/t0; echo $((now + ${DEADLINE:-770})) > $BASE/deadline
echo "${COMMIT:-unknown}" > $BASE/commit; echo "$SKIP" > $BASE/skip; echo "$DRIVER_OPTIONS" > $BASE/options
cp -r . $BASE/s/
# The repository's copy is overwritten by the next call: what is needed is taken now.
[ -e $ROOT/.dev/q/lib/full.so.xz ] || { echo "NO LIBRARY: .dev/q/lib/full.so.xz"; exit 2; }
cp $ROOT/.dev/q/lib/full.so.xz $ROOT/.dev/q/kit/cutlass.tar.xz $ROOT/.bundle/vllm.tar.xz $BASE/in/ || exit 2
(cd $ROOT; cp -r lite_attention vllm_plugin tests benchmarks tools docs examples csrc setup.py README.md pyproject.toml $BASE/repo/) || exit 2
nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader,nounits | tee $BASE/gpus.csv
nproc; free -g | head -2; df -h /tmp /dev/shm | cat; echo BASE $BASE
which python nvcc compute-sanitizer taskset; python -c 'import ninja' || echo "no ninja for Python: its program is used"
setsid nohup bash $BASE/s/warm.sh > $BASE/warm.log 2>&1 < /dev/null &
setsid nohup bash $BASE/s/prepare.sh > $BASE/prepare.log 2>&1 < /dev/null &
(cd $ROOT && bash $BASE/s/put.sh 1)
