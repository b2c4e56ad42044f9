import sys, torch, math
torch.set_num_threads(2)
PAGE=16; P0=(False,)
def quant(x, bits):
    lo=x.amin(-1,keepdim=True); st=(x.amax(-1,keepdim=True)-lo)/(2**bits-1)
    return lo+((x-lo)/st.clamp_min(1e-30)).round()*st
def pairdev(d):
    h=d.shape[-1]//2
    v=((d[...,:h]**2+d[...,h:]**2)/2).sqrt()
    return v
def cap(v,knee):
    s=v.clamp_min(0).sqrt(); lo=s.clamp_max(knee)
    return lo*(s-lo/2)
def plain(kp,q,mb,db,**o):
    m=kp.mean(-2); d=(kp-m[...,None,:]).square().mean(-2).sqrt()
    if mb: m,d=quant(m,mb),quant(d,db)
    lin=torch.einsum('grpd,gnd->grpn',q,m); v=torch.einsum('grpd,gnd->grpn',q*q,d*d)
    return lin+math.log(16)+cap(v,1.77)
def apart(kp,q,mb,db,kb,pair=False,base='mean15',knee=1.736,scale='lin'):
    m16=kp.mean(-2,keepdim=True)
    far=(kp-m16).square().sum(-1).argmax(-1)
    idx=far[...,None,None].expand(*far.shape,1,kp.shape[-1])
    key=kp.gather(-2,idx).squeeze(-2)
    m=(kp.sum(-2)-key)/15
    keep=torch.ones(kp.shape[:-1],dtype=torch.bool).scatter_(-1,far[...,None],False)
    dev=(((kp-m[...,None,:]).square()*keep[...,None]).sum(-2)/15).sqrt()
    if mb is not None: m=quant(m,mb)
    diff=key-m   # against the decoded mean
    if mb is not None:
        diff=quant(diff,kb)
        if pair:
            p=quant(pairdev(dev),4); dev=torch.cat([p,p],-1)
        elif scale=='var': dev=quant(dev*dev,db).clamp_min(0).sqrt()
        elif db==0: dev=dev.square().mean(-1,keepdim=True).sqrt().expand_as(dev)
        else: dev=quant(dev,db)
    lin=torch.einsum('grpd,gnd->grpn',q,m); v=torch.einsum('grpd,gnd->grpn',q*q,dev*dev); kx=torch.einsum('grpd,gnd->grpn',q,diff)
    return lin+torch.logaddexp(math.log(15)+cap(v,knee),kx)
def exact(kp,q,**o):
    s=torch.einsum('grpd,gnkd->grpnk',q,kp); return s.logsumexp(-1)
E_={
 'exact':(exact,{}),
 'now 8/4':(plain,dict(mb=8,db=4)),
 'apart inf':(apart,dict(mb=None,db=None,kb=None)),
 'apart 8/4/4':(apart,dict(mb=8,db=4,kb=4)),
 'apart 6/2/4':(apart,dict(mb=6,db=2,kb=4)),
 'apart 7/2/3':(apart,dict(mb=7,db=2,kb=3)),
 'apart 6/p4/4':(apart,dict(mb=6,db=4,kb=4,pair=True)),
 'apart 7/p4/3':(apart,dict(mb=7,db=4,kb=3,pair=True)),
 'apart 8/p4/2':(apart,dict(mb=8,db=4,kb=2,pair=True)),
 'apart 8/0/4':(apart,dict(mb=8,db=0,kb=4)),
}
GRID=torch.logspace(math.log10(.0005),math.log10(.5),60)
def run(file,layers=None):
    P,data=torch.load(file); rows={}
    for l,(q,k) in data.items():
        if layers and l not in layers: continue
        Hk=k.shape[0]; G=q.shape[0]//Hk; D=k.shape[-1]
        kp=k.float().unflatten(1,(-1,PAGE)); n=kp.shape[1]
        q=(q.float()*D**-.5).unflatten(0,(Hk,G)) # g r p d
        counted=(P+1)//PAGE
        vis=torch.arange(n)[None]<counted[:,None]  # p n
        first=(P+1-64).clamp_min(0)//PAGE
        always=(torch.arange(n)[None]>=first[:,None])|(torch.arange(n)[None]==0)
        ex=exact(kp,q).masked_fill(~vis,-math.inf); true=ex.softmax(-1)
        for name,(f,o) in E_.items():
            for p0 in P0:
                e=f(kp,q,**o).masked_fill(~vis,-math.inf)
                if p0:
                    e[...,0]=ex[...,0]; e=torch.where(always[None,None],ex,e)
                s=e.softmax(-1)
                rank=s.amax(1).masked_fill(always[None],math.inf)  # g p n
                r,o_=rank.sort(-1)
                ix=o_[:,None].expand_as(s)
                sd=s.masked_fill(always,math.inf).gather(-1,ix).cumsum(-1).amax(1) # g p n
                td=true.gather(-1,ix).cumsum(-1) # g r p n
                nd=torch.searchsorted(sd.contiguous(),GRID.expand(*sd.shape[:2],-1).contiguous(),right=True) # count dropped
                read=1-nd.float()/counted[None,:,None]
                left=torch.where((nd>0)[:,None],td.gather(-1,(nd-1).clamp_min(0)[:,None].expand(-1,G,-1,-1)),0.)
                rows[(l,name,p0)]=(read.mean((0,1)),left.mean((0,1,2)),left.flatten(0,2).quantile(.95,0), s, )[:3]
    return rows
def table(file,layers=None):
    rows=run(file,layers); L=sorted({k[0] for k in rows})
    print('#',file,'layers',len(L))
    print(f"{'':16s} p0 | equal true .0125: read p95 | .065: read p95 | eps .02: read true | eps .1: read true")
    for name in E_:
        for p0 in P0:
            acc=[]
            for l in L:
                read,left,p95=rows[(l,name,p0)]
                v=[]
                for t in (.0125,.065):
                    i=int((left<=t).sum()); i=max(1,min(i,len(GRID)-1)); a,b=left[i-1],left[i]; w=float(((t-a)/(b-a).clamp_min(1e-9)).clamp(0,1))
                    v+= [float(read[i-1]*(1-w)+read[i]*w), float(p95[i-1]*(1-w)+p95[i]*w)]
                for ep in (.02,.1):
                    i=int((GRID-ep).abs().argmin()); v+=[float(read[i]),float(left[i])]
                acc.append(v)
            a=torch.tensor(acc).mean(0)
            print(f"{name:16s} {int(p0)}  | {a[0]:.3f} {a[1]:.3f} | {a[2]:.3f} {a[3]:.3f} | {a[4]:.3f} {a[5]:.3f} | {a[6]:.3f} {a[7]:.3f}",flush=True)
if __name__=='__main__':
    for f in sys.argv[1:]: table(f)
