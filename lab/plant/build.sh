export PATH=/work/tools:/opt/venv/bin:/usr/local/cuda-13.0/bin:$PATH; B=/work/wt/build
F=$(sed -n 's/^flags = //p' $B/build/kernels/build.ninja); L=$(sed -n 's/^ldflags = //p' $B/build/kernels/build.ninja | sed "s#-Lbuild#-L$B/build#")
P=/work/main/.dev/q/quad/pl; mkdir -p $P
objs() { grep "^build build/kernels/_C" $B/build/kernels/build.ninja | sed 's/ | .*//' | tr ' ' '\n' | grep "\.o$" | sed "s#^#$B/#"; }
one() { N=$1; shift; cd /tmp/plant/$N || return 1; O=$(objs)
  for k in "$@"; do [ -s $k.o ] || nvcc $F -c csrc/pages/$k.cu -o $k.o || { echo FAILED $N $k; return 1; }
    O=$(echo "$O" | sed "s#.*/pages/$k\.cu\.o\$#/tmp/plant/$N/$k.o#"); done
  echo "$O" | grep -c "^/tmp/plant/$N/" | grep -qx $# || { echo "REPLACED WRONG $N"; return 1; }
  nvcc $O -o $N.so $L && xz -6 -c $N.so > $P/$N.so.xz.part && mv $P/$N.so.xz.part $P/$N.so.xz && echo "done $N $(stat -c %s $P/$N.so.xz)"; }
"$@"
