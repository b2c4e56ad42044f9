"""Time per output token of vLLM with long contexts, decoding from listed pages, beside FLASH_ATTN on the same GPU.

    python benchmarks/vllm_lists.py --out result.json          # 24 requests of 32k: a GPU with 140 GB
    python benchmarks/vllm_lists.py --requests 12              # one with 80 GB

Llama-8B's shapes with random weights, full CUDA graphs. Random weights need other pages than a model does, so lists are
forced: selection runs as always, and its result is then overwritten with random pages, 15 % of those there are. What
that overwriting takes counts against the lists. Each backend has a process of its own, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAGE = 16
ALWAYS = 5  # the newest pages, which every list has
RESERVE = 512  # tokens of the context that are generated
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def force_lists(share: float, context: int) -> None:
    """Makes the lists of long contexts in this process's layers random ones, of this share of their pages."""
    import torch

    from vllm_plugin import listing

    select_pages = listing.select_pages
    pages = context // PAGE
    count = round(share * pages)
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, heads: int) -> torch.Tensor:
        """First page, random ones before the part that is generated, room for the newest."""
        middle = torch.rand(rows, heads, pages - RESERVE // PAGE - ALWAYS, generator=generator).argsort(-1) + 1
        middle = middle[..., : count - 1 - ALWAYS].sort(-1).values
        newest = torch.zeros(rows, heads, ALWAYS, dtype=torch.long)
        return torch.cat([torch.zeros(rows, heads, 1, dtype=torch.long), middle, newest], -1).int()

    cache: dict[tuple[int, int], torch.Tensor] = {}

    def forced(q: torch.Tensor, sketch: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, *rest, **kwargs):
        lists = select_pages(q, sketch, starts, lengths, *rest, **kwargs)
        shape = lists.counts.shape
        if shape not in cache:
            cache[shape] = drawn(*shape).to(q.device)
        held = (lengths + PAGE - 1) // PAGE
        long = (held > pages - RESERVE // PAGE)[:, None]
        indices = cache[shape]
        indices[..., -ALWAYS:] = (held[:, None] - torch.arange(ALWAYS, 0, -1, device=q.device))[:, None]
        lists.indices[..., :count].copy_(torch.where(long[..., None], indices, lists.indices[..., :count]))
        lists.counts.copy_(torch.where(long, count, lists.counts))
        return lists

    listing.select_pages = forced


def serve(backend: str, requests: int, context: int, share: float, steps: int, quick: bool) -> dict:
    """One engine in this process: what it takes to prefill all requests, and then for each token."""
    import torch
    from vllm import LLM, SamplingParams

    settings = {}
    if backend == "LITE_ATTENTION":
        settings = {"additional_config": {"lite_attention": {"eps": 0.02}}}
        force_lists(share, context)
    compilation = {"cudagraph_capture_sizes": [1, 2, 4, 8, requests]}
    if quick:
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(CONFIG))
        llm = LLM(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            attention_backend=backend,
            dtype="bfloat16",
            max_model_len=context,
            max_num_seqs=requests,
            gpu_memory_utilization=0.95,
            enable_prefix_caching=False,
            compilation_config=compilation,
            **settings,
        )
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=RESERVE, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    for i in range(requests):
        prompt = [(1000 + 7919 * i + 31 * t) % 120000 for t in range(context - RESERVE)]
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    begun: set[str] = set()
    while len(begun) < requests:
        begun |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    prefill = time.perf_counter() - start
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        outputs = engine.step()
        times.append(1000 * (time.perf_counter() - start))
        assert len(outputs) == requests, f"{len(outputs)} of {requests} requests got a token"
    result = {
        "backend": backend,
        "requests": requests,
        "context": context,
        "ms_per_token": statistics.median(times[8:]),
        "ms_quartiles": statistics.quantiles(times[8:], n=4),
        "prefill_s": prefill,
        "torch_compile": not quick,
        "gpu": torch.cuda.get_device_name(),
        "pages": engine.vllm_config.cache_config.num_gpu_blocks,
    }
    if settings:
        import lite_attention

        time.sleep(2.5)
        stats = lite_attention.stats()
        result |= {"share_forced": share, "rows_listed": stats.rows_listed, "sketch_bytes": stats.sketch_bytes}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--share", type=float, default=0.15, help="of pages in each list")
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--backends", nargs="+", default=["LITE_ATTENTION", "FLASH_ATTN"])
    parser.add_argument("--out", type=Path, help="a file for the results, JSON")
    parser.add_argument("--quick", action="store_true", help="without torch.compile, which takes a minute to start")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        result = serve(args.one, args.requests, args.context, args.share, args.steps, args.quick)
        print("RESULT", json.dumps(result), flush=True)
        return
    results = []
    for backend in args.backends:
        command = [sys.executable, __file__, "--one", backend]
        for name in ("requests", "context", "share", "steps"):
            command += [f"--{name}", str(getattr(args, name))]
        command += ["--quick"] if args.quick else []
        # In one process: the lists are forced in the process that computes, and the steps are timed in it.
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
        if run.returncode or not lines:
            sys.exit(f"{backend} ended with {run.returncode}:\n{run.stdout[-4000:]}")
        results.append(json.loads(lines[0].removeprefix("RESULT ")))
        print(json.dumps(results[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
    by_backend = {result["backend"]: result["ms_per_token"] for result in results}
    if len(by_backend) == 2:
        print(f"FLASH_ATTN / LITE_ATTENTION: {by_backend['FLASH_ATTN'] / by_backend['LITE_ATTENTION']:.2f}")


if __name__ == "__main__":
    main()
