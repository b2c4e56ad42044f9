import numpy as np, random, sys
B=512; FEW=256
def bits(x): return np.asarray(x,np.float32).view(np.uint32).astype(np.int64)
def find(share, always, eps, counted):
    g,n=share.shape
    rank=bits(share.max(0))
    eps=np.float32(eps)
    per=np.float32(2147483648.0)/np.minimum(np.float32(1),np.float32(counted)*eps)
    budget=int(np.float32(eps*per))
    units=np.rint(share.astype(np.float32)*per).astype(np.int64)
    may=~always
    least=rank[may].min() if may.any() else 2**32-1
    most=rank[may].max() if may.any() else 0
    high=min(int(bits(eps)),int(most))+1
    low=min(max(int(bits(np.float32(eps/np.float32(counted)))),int(least)),high-1)
    base=np.zeros(g,np.int64); first=1
    def rng(low,high,first):
        s=0
        while (high-1-low)>>s >= B-first: s+=1
        return s
    shift=rng(low,high,first); rounds=0
    while True:
        rounds+=1
        bins=np.zeros((g,B),np.int64)
        for p in range(n):
            r=rank[p]
            if always[p] or r>=high or (r<low and not first): continue
            b=0 if r<low else int((r-low)>>shift)+first
            bins[:,b]+=units[:,p]
        over=B
        for i in range(g):
            c=base[i]+np.cumsum(bins[i]); w=np.nonzero(c>budget)[0]
            if len(w): over=min(over,int(w[0]))
        for i in range(g): base[i]+=bins[i,:over].sum()
        lo=low+((over-first)<<shift) if over>=first else None
        if over<first: cut=0; break
        if over==B: cut=high; break
        if shift==0: cut=lo; break
        first=0; high=min(high,lo+(1<<shift)); low=lo; shift=rng(low,high,0)
        inr=[p for p in range(n) if not always[p] and low<=rank[p]<high]
        if len(inr)<=FEW:
            cut=high
            for p in inr:
                for i in range(g):
                    if base[i]+sum(units[i,o] for o in inr if rank[o]<=rank[p])>budget: cut=min(cut,int(rank[p]))
            break
    return (rank>=cut)|always, rounds
def needed(share,always,eps):
    rank=np.where(always,np.inf,share.max(0)); order=np.argsort(rank,kind='stable')
    asc=rank[order]; pr=np.where(always[None],np.inf,share)[:,order].cumsum(1).max(0)
    k=(pr<=eps).sum()
    cut=asc[k]
    return rank>=cut
random.seed(1); rs=np.random.RandomState(1); bad=0; R=[]
for t in range(400):
    n=random.choice([1,2,5,40,300,2000]); g=random.choice([1,4,7])
    sp=random.choice([0,1e-6,.01,.3,2,6])
    x=rs.randn(g,n)*sp; s=np.exp(x-x.max(1,keepdims=True)); s/=s.sum(1,keepdims=True)
    al=np.zeros(n,bool); al[0]=True; al[max(0,n-random.choice([1,4])):]=True
    if random.random()<.1: al[:]=True
    eps=random.choice([1e-4,.02,.1,.5,.83,.99])
    a,r=find(s,al,eps,n); b=needed(s,al,eps)
    R.append((sp,r))
    lo=max(float((np.where(a,0,s[i])).sum()) for i in range(g))
    d=(a!=b).sum()
    if d>2 or lo>eps*1.001: bad+=1; print(t,n,g,sp,eps,'diff',d,a.sum(),b.sum(),lo)
print('bad',bad); 
import collections
c=collections.defaultdict(list)
for sp,r in R: c[sp].append(r)
print({k:(max(v),sum(v)/len(v)) for k,v in c.items()})
