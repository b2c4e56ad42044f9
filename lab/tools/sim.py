import torch, math
import sys; sys.path.insert(0,'/work/wt/score')
from lite_attention.pages import layout, estimate
torch.manual_seed(0)
L=math.log2(math.e)
def sim(q,sk,D,scale):
    sc=sk[...,:16].contiguous().view(torch.float32)
    mean=sk[...,16:16+D].float()
    st=16+-(-D//16)*16
    pairs=sk[...,st:st+D//2]; dev=torch.stack([pairs&15,pairs>>4],-1).flatten(-2)[...,:D].float()+16
    big=q.abs().amax(-1,keepdim=True)
    def power(x): return torch.ldexp(torch.ones_like(x), (13-torch.frexp(x)[1]))
    p=power(big); sp=power(big*big)
    qn=(q*p).half().float(); sn=(q*q*sp).half().float()
    A=L*scale/p; B=L*scale*scale/sp
    fo=A[...,0]*qn.sum(-1); fs=B[...,0]*sn.sum(-1)
    code=torch.einsum('rd,pd->rp',qn,mean)
    S1=torch.einsum('rd,pd->rp',sn,dev); S2=torch.einsum('rd,pd->rp',sn,dev*dev)
    do=sc[:,2]-16*sc[:,3]
    lin=sc[:,0]*fo[:,None]+sc[:,1]*code*A
    v=(do*do*fs[:,None]+B*(2*do*sc[:,3]*S1+sc[:,3]**2*S2)).clamp_min(0)
    s=v.sqrt(); K=1.77*math.sqrt(L); low=s.clamp_max(K)
    return (lin+low*(s-.5*low))/L
for D in (64,128,256):
  for sharp in (.3,1,3):
    for dt in (torch.bfloat16,torch.float16):
      k=torch.randn(500,16,D)*(torch.rand(D)*3)+torch.randn(500,1,D)*2
      q=(torch.randn(8,D)*sharp*(1+5*(torch.rand(D)>.95))).to(dt).float()
      sk=layout.encode(k)
      m,d=layout.decode(sk,D)
      ref=estimate.log_mass(q[None],m[:,None],d[:,None],torch.tensor([D**-.5]))[0]
      mine=sim(q,sk,D,torch.tensor(D**-.5))
      e=(mine.double()-ref).abs()
      print(D,sharp,dt,'max',float(e.max()),'rel',float((e/ref.abs().clamp_min(1)).max()),'range',float(ref.min()),float(ref.max()))
