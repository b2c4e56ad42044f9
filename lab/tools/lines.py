import re,collections,sys
# attributes each instruction to the outermost line in FILE (inlined-at chain)
path,want=sys.argv[1],sys.argv[2]
c=collections.Counter(); n=0; chain=[]; fresh=True
for l in open(path):
    m=re.match(r'\s*//## File "([^"]+)", line (\d+)(?: inlined at "([^"]+)", line (\d+))?',l)
    if m:
        if fresh: chain=[]; fresh=False
        chain.append((m.group(1).split('/')[-1],int(m.group(2))))
        if m.group(3): chain.append((m.group(3).split('/')[-1],int(m.group(4))))
    elif re.match(r'\s+/\*[0-9a-f]{4,5}\*/',l):
        fresh=True; n+=1
        k=[x for x in chain if x[0]==want]
        c[k[0] if k else (chain[0] if chain else None)]+=1
print(n)
src=open(sys.argv[3]).read().split('\n')
tot=0
for k,v in sorted((k,v) for k,v in c.items() if k and k[0]==want):
    print(v,k[1],src[k[1]-1].strip()[:90])
print({k:v for k,v in c.items() if not k or k[0]!=want})
