"""Rewrites Qwen's GGUF without its coarse second copy of the tied matrix (token_embd Q5_0): output.weight (Q8_0) takes its name."""
import struct, sys, hashlib, itertools
d=open('/tmp/dl/qwen.gguf','rb').read()
p=0
def u32():
    global p; v,=struct.unpack_from('<I',d,p); p+=4; return v
def u64():
    global p; v,=struct.unpack_from('<Q',d,p); p+=8; return v
def s():
    global p; n=u64(); v=d[p:p+n]; p+=n; return v
size={0:1,1:1,2:2,3:2,4:4,5:4,6:4,7:1,10:8,11:8,12:8}
def val(t):
    global p
    if t==8: s()
    elif t==9:
        e=u32(); n=u64()
        if e==8:
            for _ in range(n): s()
        else: p+=size[e]*n
    else: p+=size[t]
assert d[:4]==b'GGUF'; p=4; ver=u32(); nt=u64(); nk=u64()
kvs=[]
for _ in range(nk):
    a=p; k=s(); t=u32(); val(t); kvs.append((k,d[a:p]))
infos=[]
for _ in range(nt):
    n=s(); nd=u32(); dims=[u64() for _ in range(nd)]; ty=u32(); off=u64(); infos.append([n,dims,ty,off])
end=p; base=(end+31)//32*32
print('header end',end,'base',base,'pad',base-end,'size',len(d))
for k,b in kvs: print(k,len(b))
offs=[i[3] for i in infos]; assert offs==sorted(offs)
ends=offs[1:]+[len(d)-base]
blobs=[d[base+o:base+e] for o,e in zip(offs,ends)]
print([ (i[0],len(b)) for i,b in zip(infos,blobs)][:3])
want='d73977e6e9e74933ca667bb474e5b5b3babdbdc56cd5b3560cbeb2b042616a56'
def build(kvs, tensors):
    h=b'GGUF'+struct.pack('<IQQ',ver,len(tensors),len(kvs))+b''.join(b for _,b in kvs)
    off=0; body=[]
    for n,dims,ty,b in tensors:
        h+=struct.pack('<Q',len(n))+n+struct.pack('<I',len(dims))+b''.join(struct.pack('<Q',x) for x in dims)+struct.pack('<IQ',ty,off)
        pad=-len(b)%32; off+=len(b)+pad; body+=[b,b'\0'*pad]
    h+=b'\0'*(-len(h)%32)
    return h,body
def digest(h,body):
    m=hashlib.sha256(h); 
    for b in body: m.update(b)
    return m.hexdigest(), len(h)+sum(map(len,body))
ts=[(i[0],i[1],i[2],b) for i,b in zip(infos,blobs)]
no=[k for k in kvs if k[0]!=b'tokenizer.chat_template']
ren=[((b'token_embd.weight',)+t[1:] if t[0]==b'output.weight' else t) for t in ts if t[0]!=b'token_embd.weight']
drop=[t for t in ts if t[0]!=b'token_embd.weight']
for kn,ks in (('no template',no),):
  for tn,tl in (('renamed first',ren),('kept output first',drop),('renamed last',ren[1:]+ren[:1]),('output last',drop[1:]+drop[:1]),('sorted ren',sorted(ren)),('sorted drop',sorted(drop))):
    h,b=build(ks,tl); g=digest(h,b); print(kn,tn,g,g[0]==want, flush=True)
    if g[0]==want: open('/tmp/dl/qwen_small.gguf','wb').write(h+b''.join(b)); print('WROTE'); sys.exit()
