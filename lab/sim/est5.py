import est, sys
from est2 import *
import est2
def fullcov(kp,q,mul=1.0,knee=1.736,far=True):
    mask=torch.ones(kp.shape[:-1],dtype=torch.bool); ks=[]
    if far:
        k,mask=take(kp,mask); ks.append(k)
    n=15 if far else 16
    m=(kp*mask[...,None]).sum(-2)/n
    c=(kp-m[...,None,:])*mask[...,None]
    pr=torch.einsum('grpd,gnkd->grpnk',q,c); v=pr.square().sum(-1)/n
    lin=torch.einsum('grpd,gnd->grpn',q,m)
    tot=math.log(n)+cap(v*mul,knee)
    for k in ks: tot=torch.logaddexp(tot,torch.einsum('grpd,gnd->grpn',q,k-m))
    return lin+tot
def pcm(kp,q,mul=1.0,**o):
    # per-channel with a multiplier on the variance
    old=est.cap
    est.cap=lambda v,k: old(v*mul,k)
    try: return apart(kp,q,**o)
    finally: est.cap=old
def pl(kp,q,mul=1.0):
    old=est.cap
    est.cap=lambda v,k: old(v*mul,k)
    try: return plain(kp,q,mb=8,db=4)
    finally: est.cap=old
E5={'exact':(exact,{}),'before 8/4':(pl,{}),'before x2':(pl,dict(mul=2.)),
 'now one x1.5':(multi,dict(kq='zero',mul=1.5)),'one x4':(multi,dict(kq='zero',mul=4.)),'one x8':(multi,dict(kq='zero',mul=8.)),
 'perchan inf':(multi,dict(mb=None,kb=None,groups=0)),'perchan inf x2':(multi,dict(mb=None,kb=None,groups=0,mul=2.)),'perchan inf x4':(multi,dict(mb=None,kb=None,groups=0,mul=4.)),
 'perchan 6/2/4':(apart,dict(mb=6,db=2,kb=4)),'perchan 8/4/4':(apart,dict(mb=8,db=4,kb=4)),
 'groups8 inf':(multi,dict(mb=None,kb=None,groups=8)),
 'fullcov':(fullcov,{}),'fullcov no far':(fullcov,dict(far=False,knee=1.77)),
 'two keys':(multi,dict(kq='zero',keys=2,mul=1.5)),'three keys':(multi,dict(kq='zero',keys=3,mul=1.5)),'five keys':(multi,dict(kq='zero',keys=5,mul=1.5,knee=1.59)),
}
def tails(file):
    P,data=torch.load(file)
    print('#',file)
    for l,(q,k) in data.items():
        Hk=k.shape[0]; G=q.shape[0]//Hk; D=k.shape[-1]
        kp=k.float().unflatten(1,(-1,PAGE)); n=kp.shape[1]
        q=(q.float()*D**-.5).unflatten(0,(Hk,G))
        counted=(P+1)//PAGE
        vis=torch.arange(n)[None]<counted[:,None]
        first=(P+1-64).clamp_min(0)//PAGE
        always=(torch.arange(n)[None]>=first[:,None])|(torch.arange(n)[None]==0)
        ex=exact(kp,q).masked_fill(~vis,-math.inf); true=ex.softmax(-1)
        for name,(f,o) in E5.items():
            e=f(kp,q,**o).masked_fill(~vis,-math.inf); s=e.softmax(-1)
            rank=s.amax(1).masked_fill(always[None],math.inf); r,o_=rank.sort(-1); ix=o_[:,None].expand_as(s)
            sd=s.masked_fill(always,math.inf).gather(-1,ix).cumsum(-1).amax(1); td=true.gather(-1,ix).cumsum(-1)
            out=''
            for ep in (.02,.1):
                nd=(sd<=ep).sum(-1)
                read=(1-nd.float()/counted[None]).mean(); left=torch.where((nd>0)[:,None],td.gather(-1,(nd-1).clamp_min(0)[:,None,:,None].expand(-1,G,-1,-1)).squeeze(-1),0.)
                out+=f" | {read:.3f} {left.mean():.4f} >.1 {(left>.1).float().mean():.4f} >.3 {(left>.3).float().mean():.4f} sq {left.square().mean():.4f}"
            print(f"L{l:2d} {name:16s}{out}",flush=True)
if __name__=="__main__":
    for f in sys.argv[1:]: tails(f)
