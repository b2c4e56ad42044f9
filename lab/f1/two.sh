#!/bin/bash
# two.sh COMMIT SECONDS : memcheck while FA4 compiles, then the bench's dense and list rows beside FA3, FA4 and cuDNN. Carries .bundle/fa4.tar.xz
V=/tmp/f1; root=$PWD; export SECONDS=0 PYTHONUNBUFFERED=1; mkdir -p $V/fa4q/.dev/q $V/fa4q/.bundle $V/fa4out; rm -f $V/mem-done
mv .bundle/fa4.tar.xz $V/fa4q/.bundle/; cp -r .dev/q/fa4 $V/fa4q/.dev/q/; cp -r $V/repo/lite_attention $V/fa4q/
( cd $V/repo; sed -i 's/"memcheck": 1/"memcheck": 5/' benchmarks/gpu_fleet.py; PYTHONPATH=$PWD timeout 150 python benchmarks/gpu_fleet.py $V/out --commit $1 --gpus 0 --parts memcheck --lanes 5 --seconds 140 --job-seconds 138 > $V/memcheck.log 2>&1; echo "memcheck: rc $? after $SECONDS s" >> $V/memcheck.log; touch $V/mem-done ) &
( cd $V/fa4q/.dev/q/fa4; WAIT_FOR=$V/mem-done COMMIT=$1 ROOT=$V/fa4q O=$V/fa4out END=$(($2 - 12)) bash go.sh > $V/fa4out/log 2>&1 )
tail -8 $V/memcheck.log; grep -hE "ERROR SUMMARY" $V/out/logs/memcheck*.log | sort | uniq -c; head -40 $V/fa4out/log | cut -c1-160; tail -70 $V/fa4out/log | cut -c1-180
tar -C $V -cJf $OUT/two.tar.xz out fa4out memcheck.log
