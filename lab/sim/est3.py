import est, sys
from est2 import *
est.E_={
 'now 8/4':(plain,dict(mb=8,db=4)),
 'z x1':(multi,dict(kq='zero')),
 'z x1.5':(multi,dict(kq='zero',mul=1.5)),
 'z x2':(multi,dict(kq='zero',mul=2.)),
 'z x3':(multi,dict(kq='zero',mul=3.)),
 'z x1.5 k2':(multi,dict(kq='zero',mul=1.5,knee=2.)),
 'z x2 k2':(multi,dict(kq='zero',mul=2.,knee=2.)),
 'z x2 k1.5':(multi,dict(kq='zero',mul=2.,knee=1.5)),
 '4/4 z x2':(multi,dict(mb=4,kq='zero',mul=2.)),
}
def ratios(file):
    P,data=torch.load(file); out=[]
    for l,(q,k) in data.items():
        Hk=k.shape[0]; G=q.shape[0]//Hk; D=k.shape[-1]
        kp=k.float().unflatten(1,(-1,PAGE))[:,:400]
        q=(q.float()*D**-.5).unflatten(0,(Hk,G))
        key,mask=take(kp,torch.ones(kp.shape[:-1],dtype=torch.bool))
        s=torch.einsum('grpd,gnkd->grpnk',q,kp)
        mk=mask[:,None,None]
        mu=(s*mk).sum(-1)/15; av=((s-mu[...,None]).square()*mk).sum(-1)/15
        m=(kp*mask[...,None]).sum(-2)/15
        sv=((kp-m[...,None,:]).square()*mask[...,None]).sum(-2)/15
        e=torch.einsum('grp,gn->grpn',q.square().sum(-1),sv.mean(-1))
        pc=torch.einsum('grpd,gnd->grpn',q.square(),sv)
        out.append((av.mean()/e.mean(), (av/e).median(), av.mean()/pc.mean(), (av/pc).median()))
    t=torch.tensor(out); print(file,'var/scalar: mean-ratio',t[:,0].mean().item(),'per layer',[round(float(x),1) for x in t[:,0]],'median',t[:,1].mean().item(),'| perchan',t[:,2].mean().item(),t[:,3].mean().item())
for f in sys.argv[1:]:
    ratios(f); est.table(f)
