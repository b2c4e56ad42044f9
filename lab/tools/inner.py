import re,sys,subprocess,shutil
from collections import Counter
for o in sys.argv[1:]:
    t=subprocess.run([shutil.which("cuobjdump") or "/tmp/dis/b/cuobjdump","-sass",o],capture_output=True,text=True).stdout
    fn=None; funcs={}
    for l in t.splitlines():
        m=re.search(r'Function : (\S+)',l)
        if m: fn=m[1]; funcs[fn]=[]
        m=re.match(r'\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);',l)
        if m and fn: funcs[fn].append((int(m[1],16),m[2].strip()))
    for fn,ins in funcs.items():
        if 'fwd_kernel' not in fn: continue
        s=re.sub(r'.*TraitsI(N7cutlass)?','',fn).replace('ENS0_5ShapeILi',' ').replace('ELi',',')[:60]
        L=[]
        for a,x in ins:
            m=re.search(r'BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)',x)
            if m and int(m[1],16)<a:
                lo=int(m[1],16); body=[y for b,y in ins if lo<=b<=a]
                n=sum('HGMMA' in y for y in body)
                if n and len(body)<1400: L.append((len(body),sum('LDL' in y for y in body),sum('STL' in y for y in body),sum('R2UR' in y for y in body)))
        print(o.split('/')[-1][:22].ljust(22),s.ljust(60),'all',sum('LDL' in y or 'STL' in y for _,y in ins),'loops (n,LDL,STL,R2UR)',L)
