import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
model_dir, name, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
kept = {}
def hook(module, q, k, v, mask, **kw):
    kept[module.layer_idx] = (q[0].bfloat16().clone(), k[0].bfloat16().clone())
    return sdpa_attention_forward(module, q, k, v, mask, **kw)
AttentionInterface.register("capture", hook)
tok = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="capture").eval()
for text in sys.argv[4:]:
    ids = tok(open(f"texts/{text}.txt").read()[:n*8], return_tensors="pt").input_ids[:, :n]
    with torch.no_grad():
        model.model(ids)
    P = torch.arange(n - 1024, n, 4)
    out = {l: (kept[l][0][:, P].clone(), kept[l][1]) for l in (7, 17, 18, 20)}
    torch.save((P, out), f"{name}L-{text}.pt")
    print(text, ids.shape, flush=True)
