# all loops with HGMMA of kernels matching; prints size and mix of the innermost ones
import re,sys,subprocess,shutil
from collections import Counter
o=sys.argv[1]; pat=sys.argv[2]
t=subprocess.run([shutil.which("cuobjdump") or "/tmp/dis/b/cuobjdump","-sass",o],capture_output=True,text=True).stdout
fn=None; funcs={}
for l in t.splitlines():
    m=re.search(r'Function : (\S+)',l)
    if m: fn=m[1]; funcs[fn]=[]
    m=re.match(r'\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);',l)
    if m and fn: funcs[fn].append((int(m[1],16),m[2].strip()))
for fn,ins in funcs.items():
    if not re.search(pat,fn): continue
    s=re.sub(r'.*fwd_kernel','',fn)
    print('##',s[:150],len(ins), 'R2UR',sum('R2UR' in y for _,y in ins),'HGMMA',sum('HGMMA' in y for _,y in ins),'LDL/STL',sum(y.startswith(('LDL','STL')) or ' LDL' in y or ' STL' in y for _,y in ins))
    loops=[]
    for a,x in ins:
        m=re.search(r'BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)',x)
        if m and int(m[1],16)<a:
            lo=int(m[1],16); body=[y for b,y in ins if lo<=b<=a]
            n=sum('HGMMA' in y for y in body)
            if n: loops.append((lo,a,len(body),n,body))
    for lo,a,L,n,body in loops:
        c=Counter(re.sub(r'^@!?U?P\d+\s+','',y).split()[0].split('.')[0] for y in body)
        print(hex(lo),hex(a),L,'HGMMA',n,{k:v for k,v in c.most_common(16)})
