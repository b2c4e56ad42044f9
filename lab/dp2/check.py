import torch, itertools, math
from lite_attention.pages import *
from lite_attention import get_scheduler_metadata, flash_attn_varlen_func
torch.manual_seed(0); dev="cuda"; bad=0; n=0
def case(lens, group, hk, hd, tok, eps, min_context, meta, fill, dtype=torch.bfloat16, spread=2.0, whole=None, poison=True):
    global bad, n
    b=len(lens); mb=max(max(-(-l//16) for l in lens),1)+3
    need=sum(-(-l//16) for l in lens); nb=need+5
    k=torch.randn(nb,16,hk,hd,device=dev,dtype=dtype); v=torch.randn_like(k)
    perm=torch.randperm(nb-1,device=dev)+1
    table=torch.full((b,mb),2**30,dtype=torch.int32,device=dev); at=0
    for i,l in enumerate(lens):
        p=-(-l//16); table[i,:p]=perm[at:at+p].int(); at+=p
    qn=[min(tok,max(l,0)) for l in lens]; cu=torch.tensor([0,*itertools.accumulate(qn)],dtype=torch.int32,device=dev)
    used=torch.tensor(lens,dtype=torch.int32,device=dev)
    q=torch.randn(sum(qn),hk*group,hd,device=dev,dtype=dtype)*spread
    sk=empty_sketch(k); write_sketch(k,sk,torch.arange(nb,dtype=torch.int32,device=dev)); sk2=sk.clone()
    filled=None
    if fill:
        filled=torch.full((max(b,1),),-1,dtype=torch.int32,device=dev)
        for i,l in enumerate(lens):
            if l>=16: filled[i]=table[i,l//16-1]; sk[filled[i]]=255; sk2[filled[i]]=255
    w=None if whole is None else torch.tensor(whole,device=dev)
    args=(cu,used,table,tok)
    if fill: write_sketch(k,sk2,filled)
    ref=select_pages(q,sk2,*args,eps=eps,min_context=min_context,whole=w)
    o0,l0=attend_pages(q,k,v,ref,*args)
    m=None
    if meta: m=get_scheduler_metadata(b,tok,mb*16,hk*group,hk,hd,cu_seqlens_q=cu,total_q=sum(qn),seqused_k=used,causal=True,page_size=16,min_context=min_context,whole=w)
    lists=PageLists.empty(b,hk,hk*group,mb,torch.device(dev))
    for x in (lists.bits,lists.indices,lists.counts): x.fill_(2**31-1 if poison else 0)
    lists.left_out.fill_(float('nan'))
    for rep in range(3):
        out=torch.full_like(q,float('nan'))
        o,l,_=decode_pages(q,k,v,sk,*args,eps=eps,filled=filled,min_context=min_context,whole=w,lists=lists,scheduler_metadata=m,out=out)
        torch.cuda.synchronize()
        n+=1
        allwhole=eps==0 or all(x<min_context or (whole and whole[i]) for i,x in enumerate(lens))
        errs=[]
        if not torch.equal(lists.counts,ref.counts): errs.append('counts')
        if not torch.equal(lists.left_out,ref.left_out): errs.append('left_out')
        if not allwhole and not torch.equal(lists.bits,ref.bits): errs.append('bits')
        if not torch.equal(sk,sk2): errs.append('sketch')
        e=(o.float()-o0.float()).abs().max().item() if o.numel() else 0
        if not e<0.02: errs.append(f'out {e}')
        e=(l-l0).nan_to_num(0,0,0).abs().max().item() if l.numel() else 0
        if not e<1e-3: errs.append(f'lse {e}')
        if errs: bad+=1; print('BAD',lens[:6],group,hk,hd,tok,eps,min_context,meta,fill,rep,errs, 'kept', float(ref.counts.sum()))
    return
for hd,(meta,fill) in itertools.product((128,),((True,True),(True,False),(False,True))):
    case([4096]*4,4,8,hd,1,.1,0,meta,fill)
    case([40000],4,8,hd,1,.1,0,meta,fill)
    case([20000,20001],8,2,hd,1,.02,0,meta,fill)
    case([40000,17,0,5,3000],4,8,hd,1,.1,1024,meta,fill)
    case([1000,17,0,5,300],4,8,hd,1,.1,1024,meta,fill)
    case([16*i+3 for i in range(64)],4,8,hd,1,.1,0,meta,fill)
    case([100+i*7 for i in range(200)],2,8,hd,1,.1,0,meta,fill)
    case([5000,4000,900,16,15],4,4,hd,5,.1,0,meta,fill)
    case([5000,4000,900,16,15],1,1,hd,1,.1,0,meta,fill,whole=[False,True,False,False,True])
    case([5000,4000],7,2,hd,1,.1,0,meta,fill,whole=[True,True])
    case([5000,4000],7,2,hd,1,0.,0,meta,fill)
    case([131072],4,8,hd,1,.1,0,meta,fill,spread=3.)
# lists against the reference, with clusters, ties and many rounds
import lite_attention
for spread,eps,lens,hk,g,tok in ((0.,.1,[60000],8,4,1),(.3,.02,[60000],8,4,1),(3.,.001,[100000],2,7,1),(1.,.1,[33000,9000],4,4,3),(2.,.1,[70000]*2,8,4,1),(4.,.3,[90000],8,8,1),(1.,.1,[40000]*3,8,1,2)):
    for kind in ('random','equal','few'):
        b=len(lens); mb=max(lens)//16+2; nb=b*mb
        k=torch.randn(nb,16,hk,64,device=dev,dtype=torch.bfloat16)
        if kind=='equal': k[:]=k[:1,:1]
        if kind=='few': k=k[torch.arange(nb,device=dev)%5].contiguous()
        table=torch.randperm(nb,device=dev).int().view(b,mb)
        used=torch.tensor(lens,dtype=torch.int32,device=dev); cu=torch.arange(b+1,device=dev,dtype=torch.int32)*tok
        q=torch.randn(b*tok,hk*g,64,device=dev,dtype=torch.bfloat16)*spread
        sk=empty_sketch(k); write_sketch(k,sk,torch.arange(nb,dtype=torch.int32,device=dev))
        a=select_pages(q,sk,cu,used,table,tok,eps=eps); r=select_pages(q,sk,cu,used,table,tok,eps=eps,backend='reference')
        n+=1; apart=(a.listed()!=r.listed()).float().mean().item(); d=(a.left_out-r.left_out).abs().max().item()
        if apart>2e-3 or d>2e-3: bad+=1
        if apart>2e-4 or d>1e-3: print('lists', spread,eps,lens,kind,'apart',apart,'left_out',d, float(a.counts.float().mean()), float(r.counts.float().mean()))
print(n,'calls',bad,'bad')
