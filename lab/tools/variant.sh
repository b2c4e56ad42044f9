# variant.sh NAME: /tmp/NAME/csrc/pages/score.cu and sketch.cu into .dev/q/apart/NAME.so.xz
export PATH=/work/tools:/opt/venv/bin:/usr/local/cuda-13.0/bin:$PATH; N=$1; B=/work/wt/build
F=$(sed -n 's/^flags = //p' $B/build/kernels/build.ninja); L=$(sed -n 's/^ldflags = //p' $B/build/kernels/build.ninja | sed "s#-Lbuild#-L$B/build#")
cd /tmp/$N; for k in ${2:-score}; do nvcc $F -c csrc/pages/$k.cu -o $k.o || exit 1; done
O=$(grep "^build build/kernels/_C" $B/build/kernels/build.ninja | tr ' ' '\n' | grep "\.o$" | sed "s#^#$B/#"); for k in ${2:-score}; do O=$(echo "$O" | sed "s#.*pages/$k.cu.o#/tmp/$N/$k.o#"); done
nvcc $O -o $N.so $L && xz -6 -T2 -c $N.so > /work/main/.dev/q/apart/$N.so.xz && ls -l /work/main/.dev/q/apart/$N.so.xz
