import torch
from lite_attention import SkipList, skip_attention
torch.manual_seed(0)
q, k, v = (torch.randn(1, s, 4, 128, device="cuda", dtype=torch.bfloat16) for s in (9000, 3000, 3000))
full = SkipList.fresh(1, 4, 9000, 3000, head_dim=128, device="cuda")
visits = torch.rand(full.visits().shape, device="cuda") < 0.4
a, b = (SkipList.from_visits(visits, (full.block_m, full.block_n), 9000, 3000) for _ in range(2))
t = torch.full((), -4.0, device="cuda")
for causal in (False, True):
    o, r = skip_attention(q, k, v, a, t, causal=causal)[0], skip_attention(q, k, v, b, t, causal=causal, backend="reference")[0]
    torch.cuda.synchronize()
    print("smoke", causal, float((o.float() - r.float()).abs().max()), int((a.visits() ^ b.visits()).sum()), int(a.visits().sum()))
