import est, torch, math, sys
from est import *
def qsym(x,bits):
    M=x.abs().amax(-1,keepdim=True); L=2**bits-1
    st=2*M/L; c=((x+M)/st.clamp_min(1e-30)).round().clamp(0,L)
    return -M+c*st
def qzero(x,bits): # zero exactly representable: levels -7..7
    M=x.abs().amax(-1,keepdim=True); L=2**(bits-1)-1
    st=M/L; return (x/st.clamp_min(1e-30)).round()*st
def take(kp,mask):
    # farthest among mask from their mean
    n=mask.sum(-1,keepdim=True)[...,None]
    m=(kp*mask[...,None]).sum(-2,keepdim=True)/n
    d=(kp-m).square().sum(-1).masked_fill(~mask,-1)
    far=d.argmax(-1)
    key=kp.gather(-2,far[...,None,None].expand(*far.shape,1,kp.shape[-1])).squeeze(-2)
    return key, mask.scatter(-1,far[...,None],False)
def multi(kp,q,mb=8,kb=4,keys=1,groups=1,kq='lin',knee=None,sb=None,mul=1.0):
    mask=torch.ones(kp.shape[:-1],dtype=torch.bool); ks=[]
    for _ in range(keys):
        k,mask=take(kp,mask); ks.append(k)
    n=16-keys
    knee=knee or {15:1.736,14:1.703,13:1.668,16:1.766}[n]
    m=(kp*mask[...,None]).sum(-2)/n
    var=((kp-m[...,None,:]).square()*mask[...,None]).sum(-2)/n
    D=m.shape[-1]
    mq=quant(m,mb) if mb else m
    # groups over RoPE pairs
    order=torch.cat([torch.arange(D//2).view(groups,-1),torch.arange(D//2,D).view(groups,-1)],-1) if groups else None
    lin=torch.einsum('grpd,gnd->grpn',q,mq)
    if groups:
        gv=var[...,order].mean(-1)  # g n G
        q2=(q*q)[...,order].sum(-1)
        v=torch.einsum('grpG,gnG->grpn',q2,gv)
    else: v=torch.einsum('grpd,gnd->grpn',q*q,var)
    tot=math.log(n)+cap(v*mul,knee)
    for k in ks:
        diff=k-mq
        if kb: diff={'lin':quant,'sym':qsym,'zero':qzero}[kq](diff,kb)
        tot=torch.logaddexp(tot,torch.einsum('grpd,gnd->grpn',q,diff))
    return lin+tot
def noise(kp,q,**o): return multi(kp,q,**o)
V={
 'exact':(exact,{}),'now 8/4':(plain,dict(mb=8,db=4)),'now 4/4':(plain,dict(mb=4,db=4)),
 'inf perchan':(multi,dict(mb=None,kb=None,groups=0)),
 'inf 1':(multi,dict(mb=None,kb=None,groups=1)),
 'inf 4':(multi,dict(mb=None,kb=None,groups=4)),
 'inf 8':(multi,dict(mb=None,kb=None,groups=8)),
 '8/4 1':(multi,dict()),
 '8/4 1 sym':(multi,dict(kq='sym')),
 '8/4 1 zero':(multi,dict(kq='zero')),
 '8/4 1 x1.5':(multi,dict(mul=1.5)),
 '8/4 4 sym':(multi,dict(groups=4,kq='sym')),
 '7/4 1 sym':(multi,dict(mb=7,kq='sym')),
 '8/3 1 sym':(multi,dict(kb=3,kq='sym')),
 '4/4 1 sym':(multi,dict(mb=4,kq='sym')),
 '5/3 1 sym':(multi,dict(mb=5,kb=3,kq='sym')),
 '6/3 two':(multi,dict(mb=6,kb=3,keys=2,kq='sym')),
 '8/4 two':(multi,dict(mb=8,kb=4,keys=2,kq='sym')),
 '8/4 three':(multi,dict(mb=8,kb=4,keys=3,kq='sym')),
}
est.E_=V
import builtins
# only p0 False
src=open('est.py').read()
if __name__=='__main__':
    for f in sys.argv[1:]: est.table(f)
