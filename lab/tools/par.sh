# par.sh TREE OUT INST... : objects two at a time into ccache, then lean
cd $1; out=$2; shift 2
export PATH=/work/tools:/opt/venv/bin:$PATH
for i in "$@"; do echo $i; done | xargs -P 2 -I{} bash -c 'bash /work/tools/lean /tmp/par_'$$'_{}.so {} > /tmp/par_{}.log 2>&1'
bash /work/tools/lean $out "$@"; rm -f /tmp/par_$$_*.so
