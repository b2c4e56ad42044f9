# hot.py OBJ : the loop around the products along its hot path: forward branches that skip a block without HGMMA are taken
import re,sys,subprocess
from collections import Counter
t=subprocess.run(["cuobjdump","-sass",sys.argv[1]],capture_output=True,text=True).stdout
fn=None;funcs={}
for l in t.splitlines():
    m=re.search(r'Function : (\S+)',l)
    if m: fn=m[1]; funcs[fn]=[]
    m=re.match(r'\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);',l)
    if m and fn: funcs[fn].append((int(m[1],16),m[2].strip()))
for fn,ins in funcs.items():
    if 'fwd_kernel' not in fn: continue
    best=None
    for a,x in ins:
        m=re.search(r'BRA\S*\s+(?:\S+,\s*)?(?:\S+,\s*)?0x([0-9a-f]+)',x)
        if m and int(m[1],16)<a:
            lo=int(m[1],16)
            n=sum('HGMMA' in y for c,y in ins if lo<=c<=a)
            if n and (best is None or a-lo<best[1]-best[0]): best=(lo,a)
    lo,hi=best
    idx={a:i for i,(a,_) in enumerate(ins)}
    i=idx[lo]; path=[]; skipped=[]
    while True:
        a,x=ins[i]; path.append(x)
        if a==hi: break
        m=re.search(r'BRA\S*\s+(?:\S+,\s*)?(?:\S+,\s*)?0x([0-9a-f]+)',x)
        if m:
            to=int(m[1],16)
            if a<to<=hi:
                blk=[y for c,y in ins if a<c<to]
                if not any('HGMMA' in y or 'WARPGROUP' in y for y in blk) and sum('MUFU' in y for y in blk)<20 :
                    skipped.append((i-idx[lo],len(blk))); i=idx[to]; continue
        i+=1
    c=Counter(re.sub(r'^@\S+ ','',y).split()[0] for y in path)
    print(re.sub(r'.*TraitsI','',fn)[:70], 'loop', idx[hi]-idx[lo]+1, 'hot', len(path), 'LDL',c['LDL']+c['LDL.64'],'STL',c['STL'],'R2UR',c['R2UR'],'skipped',skipped)
    if len(sys.argv)>2: print(c.most_common(40))
    if len(sys.argv)>3:
        for y in path: print('   ',y)
