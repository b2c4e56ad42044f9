import re,sys,subprocess,shutil
o=sys.argv[1]; pat=sys.argv[2]; full=len(sys.argv)>3
t=subprocess.run([shutil.which("cuobjdump") or "/tmp/dis/b/cuobjdump","-sass",o],capture_output=True,text=True).stdout
fn=None; funcs={}
for l in t.splitlines():
    m=re.search(r'Function : (\S+)',l)
    if m: fn=m[1]; funcs[fn]=[]
    m=re.match(r'\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);',l)
    if m and fn: funcs[fn].append((int(m[1],16),m[2].strip()))
for fn,ins in funcs.items():
    if not re.search(pat,fn): continue
    best=None
    for a,x in ins:
        m=re.search(r'BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)',x)
        if m and int(m[1],16)<a:
            lo=int(m[1],16); body=[y for b,y in ins if lo<=b<=a]
            n=sum('HMMA' in y for y in body)
            if n and (best is None or len(body)<len(best)): best=body
    print(fn[-60:],len(ins),'loop',len(best))
    from collections import Counter
    c=Counter(re.sub(r'^@!?U?P\d+\s+','',y).split()[0].split('.')[0] for y in best)
    print(dict(c.most_common()))
    if full: print('\n'.join(best))
