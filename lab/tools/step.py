import re,sys,subprocess
o,pat=sys.argv[1:3]
t=subprocess.run(["cuobjdump","-sass",o],capture_output=True,text=True).stdout
fn=None;funcs={}
for l in t.splitlines():
    m=re.search(r'Function : (\S+)',l)
    if m: fn=m[1]; funcs[fn]=[]
    m=re.match(r'\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);\s*/\* 0x([0-9a-f]+) \*/',l)
    if m and fn: funcs[fn].append([int(m[1],16),m[2].strip(),int(m[3],16),0]); continue
    m=re.match(r'\s+/\* 0x([0-9a-f]+) \*/',l)
    if m and fn and funcs[fn]: funcs[fn][-1][3]=int(m[1],16)
for fn,ins in funcs.items():
    if not re.search(pat,fn): continue
    loops=[]
    for a,x,*_ in ins:
        m=re.search(r'BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)',x)
        if m and int(m[1],16)<a:
            lo=int(m[1],16); body=[i for i in ins if lo<=i[0]<=a]
            if any('HGMMA' in i[1] for i in body): loops.append(body)
    b=min(loops,key=len)
    print('##',fn[:140],len(b))
    for a,x,w0,w1 in b:
        c=(w1>>41)&0x1fffff   # control bits of the upper word
        stall=c&15; y=(c>>4)&1; wr=(c>>5)&7; rd=(c>>8)&7; wait=(c>>11)&63
        print(f"{a:05x} s{stall:2d} {'-' if y else 'Y'} w{wr if wr!=7 else '-'} r{rd if rd!=7 else '-'} {''.join(str(i) if wait>>i&1 else '.' for i in range(6))}  {x}")
