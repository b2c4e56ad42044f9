"""Time per output token of vLLM with a real model and long prompts of real code: lists beside FLASH_ATTN, on one GPU.

    python benchmarks/vllm_code.py MODEL --out result.json            # 128 requests of 28000 tokens
    python benchmarks/vllm_code.py MODEL --only eps=0.1,FLASH_ATTN    # some of the engines
    python benchmarks/vllm_code.py --table result.json

MODEL is a Hugging Face directory. Engines run one after the other, each in processes of its own, as `vllm serve` has
them (torch.compile, asynchronous scheduling, full CUDA graphs of decode steps). All requests come at once; timed are
the steps after the last prompt, in which every request gets a token. `--out` is written after each engine, and a second
run goes on from there. How long outputs stay those of FLASH_ATTN is told too: rounding alone parts them.
"""

from __future__ import annotations

import argparse
import json
import statistics
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

ROOM = 512  # tokens that are generated at most: the first request has them while the last prompts are prefilled
COMPARED = 64  # tokens of each output
ENGINES = ("eps=0.1", "FLASH_ATTN", "eps=0.02", "eps=0")
PEER = "FLASH_ATTN"


def serve(engine: str, prompts: list[list[int]], arguments: argparse.Namespace) -> dict:
    """One engine: its times, and the first tokens of each of its `outputs`."""
    from vllm import LLM, SamplingParams

    eps = None if engine == PEER else float(engine.removeprefix("eps="))
    settings = {} if eps is None else {"block_size": 16, "additional_config": {"lite_attention": {"eps": eps}}}
    compilation = {"cudagraph_capture_sizes": sorted({1, 2, 4, 8, 16, 32, 64, len(prompts)})}
    if arguments.quick:
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    start = time.perf_counter()
    llm = LLM(
        model=str(arguments.model),
        skip_tokenizer_init=True,
        attention_backend=PEER if eps is None else "LITE_ATTENTION",
        dtype="bfloat16",
        max_model_len=len(prompts[0]) + ROOM,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=16384,
        gpu_memory_utilization=arguments.gpu_memory or 0.92,
        enable_prefix_caching=False,
        compilation_config=compilation,
        **profiler_config(arguments.profile),
        **settings,
    )
    started = time.perf_counter() - start
    params = SamplingParams(temperature=0, max_tokens=ROOM, ignore_eos=True, detokenize=False)
    found, tokens = time_steps(llm, prompts, params, arguments.steps, arguments.profile)
    config = llm.llm_engine.vllm_config
    result = {
        "engine": engine,
        "requests": len(prompts),
        "prompt_tokens": len(prompts[0]),
        "start_s": started,
        "torch_compile": not arguments.quick,
        "kv_cache_pages": config.cache_config.num_gpu_blocks,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        **found,
        "outputs": [each[:COMPARED] for each in tokens],
    }
    return result | ({"eps": eps, **counted()} if eps else {})


def agreement(outputs: list[list[int]], others: list[list[int]]) -> dict:
    """Tokens before the first that differs: of how many outputs none does, the median and the mean."""
    same = [
        next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), COMPARED)
        for one, other in zip(outputs, others, strict=True)
    ]
    return {
        "same": sum(each == COMPARED for each in same),
        "median": statistics.median(same),
        "mean": statistics.fmean(same),
        "of_tokens": COMPARED,
    }


def table(results: dict[str, dict]) -> str:
    peer = results.get(PEER)
    lines = [
        "| engine | ms a token | quartiles | times faster | pages read | left out (est.) | prefill s | outputs agree |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in results.items():
        low, _, high = each["ms_quartiles"]
        agree = each.get("agreement")
        cells = [
            name,
            f"{each['ms_per_token']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{peer['ms_per_token'] / each['ms_per_token']:.2f}" if peer else "",
            f"{each['pages_read']:.3f}" if "pages_read" in each else "",
            f"{each['left_out_estimate']:.4f}" if "left_out_estimate" in each else "",
            f"{each['prefill_s']:.1f}",
            f"{agree['same']} of {each['requests']}, median {agree['median']:g} of {agree['of_tokens']}"
            if agree
            else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> dict[str, dict]:
    results = kept(arguments.out)
    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.json"
        command = [__file__, str(arguments.model), "--prompts", str(prompts), *handed_on(arguments)]
        missing = [engine for engine in arguments.only if engine not in results]
        outputs = arguments.out.with_suffix(".outputs.json") if arguments.out else Path(scratch) / "outputs.json"
        found = kept(outputs)
        with Engines({engine: [*command, "--one", engine] for engine in missing}) as engines:
            prompts.write_text(json.dumps(prompts_for(arguments)))  # while they import
            for engine in missing:
                result = engines.run(engine)
                found[engine] = result.pop("outputs")
                results[engine] = result | machine() | {"commit": arguments.commit}
                for name in results.keys() & found.keys() - {PEER} if PEER in found else ():
                    results[name]["agreement"] = agreement(found[name], found[PEER])
                keep(outputs, found)
                keep(arguments.out, results)
                print(f"{engine}: {results[engine]['ms_per_token']:.2f} ms a token", flush=True)
    return results


def prompts_for(arguments: argparse.Namespace) -> list[list[int]]:
    from code_prompts import code_prompts
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    return code_prompts(tokenizer, arguments.requests, arguments.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=28000, help="of each prompt")
    parser.add_argument("--only", type=lambda text: text.split(","), default=ENGINES, help="of " + ", ".join(ENGINES))
    add_arguments(parser)
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a file, and measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(kept(arguments.table)))
    elif arguments.model is None:
        parser.error("MODEL is missing")
    elif arguments.one:
        wait_for_turn()
        prompts = json.loads(arguments.prompts.read_text())
        report(serve(arguments.one, prompts, arguments))
    else:
        print(table(measure(arguments)))


if __name__ == "__main__":
    main()
