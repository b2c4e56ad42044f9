# hclk.py OBJ [L] [show]: clocks of one warp along the hot path from QK's end to loop end and on to PV issued
import re,sys,subprocess
L=int(sys.argv[2]) if len(sys.argv)>2 else 30
t=subprocess.run(["cuobjdump","-sass",sys.argv[1]],capture_output=True,text=True).stdout
fn=None;funcs={}
for l in t.splitlines():
    m=re.search(r'Function : (\S+)',l)
    if m: fn=m[1]; funcs[fn]=[]
    m=re.match(r'\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);\s*/\* 0x([0-9a-f]+) \*/',l)
    if m and fn: funcs[fn].append([int(m[1],16),m[2].strip(),0]); continue
    m=re.match(r'\s+/\* 0x([0-9a-f]+) \*/',l)
    if m and fn and funcs[fn]: funcs[fn][-1][2]=int(m[1],16)
for fn,ins in funcs.items():
    if 'fwd_kernel' not in fn: continue
    best=None
    for a,x,_ in ins:
        m=re.search(r'BRA\S*\s+(?:\S+,\s*)?(?:\S+,\s*)?0x([0-9a-f]+)',x)
        if m and int(m[1],16)<a:
            lo=int(m[1],16); n=sum('HGMMA' in i[1] for i in ins if lo<=i[0]<=a)
            if n and (best is None or a-lo<best[1]-best[0]): best=(lo,a)
    lo,hi=best; idx={i[0]:k for k,i in enumerate(ins)}
    i=idx[lo]; path=[]
    while True:
        a,x,w=ins[i]; path.append((a,x,w))
        if a==hi: break
        m=re.search(r'BRA\S*\s+(?:\S+,\s*)?(?:\S+,\s*)?0x([0-9a-f]+)',x)
        if m:
            to=int(m[1],16)
            if a<to<=hi:
                blk=[y for c,y,_ in ins if a<c<to]
                if not any('HGMMA' in y or 'WARPGROUP' in y for y in blk) and sum('MUFU' in y for y in blk)<20: i=idx[to]; continue
        i+=1
    start=next(k for k,p in enumerate(path) if 'DEPBAR.LE gsb0, 0x1' in p[1])
    T=0; sb=[0]*6; mufu=0; marks={}; out=[]
    for k,(a,x,w1) in enumerate(path[start:]+path[:start]):
        c=(w1>>41)&0x1fffff
        stall=c&15; wr=(c>>5)&7; rd=(c>>8)&7; wait=(c>>11)&63
        for j in range(6):
            if wait>>j&1: T=max(T,sb[j])
        if 'MUFU' in x: T=max(T,mufu); mufu=T+8
        lat=L if 'MUFU' in x else 25
        if wr!=7: sb[wr]=max(sb[wr],T+lat)
        if rd!=7: sb[rd]=max(sb[rd],T+12)
        if 'MUFU' in x: marks.setdefault('first MUFU',T); marks['last MUFU']=T
        if 'FMNMX' in x: marks.setdefault('first max',T); marks['last max']=T
        if 'DEPBAR.LE gsb0, 0x0' in x: marks['PV wait']=T
        if 'F2FP' in x: marks.setdefault('first F2FP',T); marks['last F2FP']=T
        if 'HGMMA' in x: marks.setdefault('first HGMMA',T); marks['last HGMMA']=T
        if 'BAR.SYNC' in x: marks['turn']=T
        if 'BAR.ARV' in x: marks['pass']=T
        out.append((T,stall,x)); T+=max(stall,1)
    print(re.sub(r'.*TraitsI','',fn)[26:66],'L',L,marks,'instr',len(path))
    if len(sys.argv)>3:
        for o in out:
            if sys.argv[3]=='2' or not re.search('FMNMX|MUFU|FFMA|FADD|F2FP',o[2]): print('   ',o[0],o[1],o[2][:80])
