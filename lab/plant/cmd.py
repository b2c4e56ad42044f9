import sys; sys.path.insert(0,'/work/main/.dev/q/quad/s'); sys.dont_write_bytecode=True
import plans; from pathlib import Path
for j in plans.apart3(Path('/tmp/db-apart3'),'7aef596',sys.argv[1]):
    if sys.argv[2]=='all': print(j['name'],j['limit'],j['after'],[str(x).replace('/tmp/db-apart3/','') for x in j['needs']],j.get('env'),'\n   ',j['command'][:330])
    elif j['name']==sys.argv[2]: print(j['command'])
