#!/bin/bash
# deliver.sh FILES_AT NAME... : unpacks results to .dev/q/NAME/result/ and unmarks the request.
cd /work/main/.dev/q; at=$1; shift
for n in "$@"; do rm -rf $n/result; mkdir -p $n/result; tar -C $n/result --strip-components=1 -xJf $at/$n.tar.xz; rm -f $n/ready; touch $n/done; done
