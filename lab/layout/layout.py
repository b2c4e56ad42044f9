"""Does it matter to scores and attention over lists how pages of heads lie in memory? Qwen's shapes: 14/2 heads, head dim 64."""
import sys, torch
from lite_attention.pages import PAGE, PageLists, attend_pages, select_pages, sketch_bytes, write_sketch
dev = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"); small = dev.type == "cpu"
torch.manual_seed(0)
def run(batch, context, heads, heads_k, d, share):
    pages = context // PAGE; total = batch * pages
    table = torch.randperm(total, device=dev).view(batch, pages).int() if RANDOM else torch.arange(total, device=dev).view(batch, pages).int()
    q = torch.randn(batch, heads, d, device=dev, dtype=torch.bfloat16)
    starts = torch.arange(batch + 1, device=dev, dtype=torch.int32); used = torch.full((batch,), context, device=dev, dtype=torch.int32)
    sb = sketch_bytes(d); kv = PAGE * heads_k * d
    page_bytes = 2 * kv * 2 + (heads_k * sb + 15) // 16 * 16
    raw = torch.zeros(total * page_bytes, dtype=torch.uint8, device=dev)
    def inside(hnd):
        words = raw.view(torch.bfloat16); stride = page_bytes // 2
        st = (stride, d, PAGE * d, 1) if hnd else (stride, heads_k * d, d, 1)
        k = torch.as_strided(words, (total, PAGE, heads_k, d), st, 0); v = torch.as_strided(words, (total, PAGE, heads_k, d), st, kv)
        s = torch.as_strided(raw, (total, heads_k, sb), (page_bytes, sb, 1), 4 * kv)
        return k, v, s
    def apart(hnd):
        words = raw.view(torch.bfloat16)[: total * 2 * kv]; st = (2 * kv, d, PAGE * d, 1) if hnd else (2 * kv, heads_k * d, d, 1)
        k = torch.as_strided(words, (total, PAGE, heads_k, d), st, 0); v = torch.as_strided(words, (total, PAGE, heads_k, d), st, kv)
        s = raw[total * 4 * kv :][: total * heads_k * sb].view(total, heads_k, sb)
        return k, v, s
    gen = torch.Generator().manual_seed(1)
    out = {}
    for name, (k, v, s) in {"inside NHD": inside(False), "inside HND": inside(True), "apart NHD": apart(False), "apart HND": apart(True)}.items():
        for i in range(0, total, 4096):
            n = min(4096, total - i); k[i:i+n] = torch.randn(n, PAGE, heads_k, d, device=dev, dtype=torch.bfloat16) + torch.randn(n, 1, heads_k, d, device=dev, dtype=torch.bfloat16); v[i:i+n].normal_()
        write_sketch(k, s, table.flatten())
        lists = PageLists.empty(batch, heads_k, heads, pages, dev)
        gen.manual_seed(1)
        for b in range(batch): lists.write(b, (torch.rand(heads_k, pages, generator=gen) < share).to(dev))
        sel = lambda: select_pages(q, s, starts, used, table, 1, eps=0.1, newest=64)
        att = lambda: attend_pages(q, k, v, lists, starts, used, table, 1)
        for what, f in (("select", sel), ("attend", att)):
            f()
            if small: out[name, what] = 0; continue
            torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
            with torch.cuda.graph(g): f()
            flush = torch.empty(256 << 20, dtype=torch.uint8, device=dev); ts = []
            for _ in range(8):
                flush.zero_(); a, b2 = torch.cuda.Event(True), torch.cuda.Event(True); a.record(); g.replay(); b2.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b2) * 1e3)
            out[name, what] = sorted(ts)[4]
    print("random pages" if RANDOM else "pages in order", f"b{batch} x {context}, {heads}/{heads_k} heads, hd {d}, {share}:", {" ".join(k): round(t, 1) for k, t in out.items()}, flush=True)
for RANDOM in (False, True):
    run(*((4, 1024, 14, 2, 64, 0.2) if small else (128, 28672, 14, 2, 64, 0.175)))
    run(*((4, 1024, 32, 8, 128, 0.2) if small else (12, 32768, 32, 8, 128, 0.15)))
