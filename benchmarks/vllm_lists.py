"""Time per output token of vLLM with long contexts, decoding from listed pages, beside FLASH_ATTN on the same GPU.

    python benchmarks/vllm_lists.py --out result.json          # 24 requests of 32k: a GPU with 140 GB
    python benchmarks/vllm_lists.py --requests 12              # one with 80 GB
    python benchmarks/vllm_lists.py --tensor-parallel 2        # two with 80 GB

Llama-8B's shapes with random weights, full CUDA graphs. Random weights need other pages than a model does, so lists are
forced: selection runs as always, and its result is then overwritten with random pages, 15 % of those there are. What
that overwriting takes counts against the lists, and so does that a step is three calls for it, whose kernels don't
overlap as those of a server's one call do. Engines run in processes of their own, as `vllm serve` has them
(asynchronous scheduling), one after the other; `--out` is written after each, and a second run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from vllm_steps import (
    Engines,
    add_arguments,
    counted,
    handed_on,
    keep,
    kept,
    machine,
    profiler_config,
    report,
    time_steps,
    wait_for_turn,
)

PAGE = 16
FORCED = "FORCED_LISTS"
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


def force() -> None:
    """Forces lists as the environment says. A process that vLLM forks has them too; one that it spawns runs this."""
    from forced_lists import force_lists

    force_lists(*json.loads(os.environ[FORCED]))


if __name__ == "__mp_main__" and FORCED in os.environ:
    force()


def serve(arguments: argparse.Namespace) -> dict:
    """One engine: what it takes to prefill all requests, and then for each token."""
    from vllm import LLM, SamplingParams

    requests, context = arguments.requests, arguments.context
    settings = {}
    if arguments.one == "LITE_ATTENTION":
        settings = {"block_size": 16, "additional_config": {"lite_attention": {"eps": 0.02}}}
        os.environ[FORCED] = json.dumps([arguments.share, (context - RESERVE) // PAGE])
        force()
    compilation = {"cudagraph_capture_sizes": [1, 2, 4, 8, requests]}
    if arguments.quick:
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(CONFIG))
        llm = LLM(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            attention_backend=arguments.one,
            dtype="bfloat16",
            max_model_len=context,
            max_num_seqs=requests,
            gpu_memory_utilization=arguments.gpu_memory or 0.95,
            tensor_parallel_size=arguments.tensor_parallel,
            enable_prefix_caching=False,
            compilation_config=compilation,
            **profiler_config(arguments.profile),
            **settings,
        )
    started = time.perf_counter() - start
    params = SamplingParams(temperature=0, max_tokens=RESERVE, ignore_eos=True, detokenize=False)
    prompts = [[(1000 + 7919 * i + 31 * t) % 120000 for t in range(context - RESERVE)] for i in range(requests)]
    found, _ = time_steps(llm, prompts, params, arguments.steps, arguments.profile)
    result = {
        "backend": arguments.one,
        "requests": requests,
        "context": context,
        "tensor_parallel": arguments.tensor_parallel,
        "start_s": started,
        "torch_compile": not arguments.quick,
        "kv_cache_pages": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        **found,
    }
    if settings:
        result |= {"share_forced": arguments.share, **counted()}
        if abs(result["pages_read"] - arguments.share) > 0.02:
            raise RuntimeError(f"lists are not those that were to be forced: {result}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--share", type=float, default=0.15, help="of pages in each list")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs")
    parser.add_argument("--backends", nargs="+", default=["LITE_ATTENTION", "FLASH_ATTN"])
    add_arguments(parser)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        wait_for_turn()
        report(serve(arguments))
        return
    results = kept(arguments.out)
    commands = {}
    for backend in arguments.backends:
        commands[backend] = [__file__, "--one", backend, *handed_on(arguments)]
        for name in ("requests", "context", "share", "tensor_parallel"):
            commands[backend] += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    missing = {backend: command for backend, command in commands.items() if backend not in results}
    with Engines(missing) as engines:
        for backend in missing:
            results[backend] = engines.run(backend) | machine() | {"commit": arguments.commit}
            keep(arguments.out, results)
            print(json.dumps(results[backend]), flush=True)
    ms = [results[name]["ms_per_token"] for name in ("FLASH_ATTN", "LITE_ATTENTION") if name in results]
    if len(ms) == 2:
        print(f"FLASH_ATTN / LITE_ATTENTION: {ms[0] / ms[1]:.2f}")


if __name__ == "__main__":
    main()
