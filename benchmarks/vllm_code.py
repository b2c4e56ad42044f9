"""Time per output token of vLLM with a real model and long prompts of real code: lists beside FLASH_ATTN, on one GPU.

    python benchmarks/vllm_code.py MODEL --out result.json            # 128 requests of 28000 tokens
    python benchmarks/vllm_code.py MODEL --only eps=0.1,FLASH_ATTN    # some of the engines
    python benchmarks/vllm_code.py MODEL --requests 64 --tokens 8192-32256 --steps 248 --out result.json
    python benchmarks/vllm_code.py --table result.json                # or of several files, where engines ran apart

MODEL is a Hugging Face directory, with positions for the longest prompt and 512 tokens more. Engines run one after the
other, each in processes of its own, as `vllm serve` has them (torch.compile, asynchronous scheduling, full CUDA graphs
of decode steps). All requests come at once; timed are the steps after the last prompt, in which every request gets a
token. `--out` is written after each engine, and a second run goes on from there. How long outputs stay those of
FLASH_ATTN is told too: rounding alone parts them. Beside the
results are the outputs, `.outputs.json`, and where they part, `.differences.md`; `side_by_side.py` makes the latter of
engines that ran apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from side_by_side import Outputs, agreement, decoder, markdown, read
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
        max_model_len=max(map(len, prompts)) + ROOM,
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
        "prompt_tokens": max(map(len, prompts)),
        "shortest_prompt_tokens": min(map(len, prompts)),
        "start_s": started,
        "torch_compile": not arguments.quick,
        "kv_cache_pages": config.cache_config.num_gpu_blocks,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        **found,
        # As many of each as all have.
        "outputs": {"prompt_tokens": [*map(len, prompts)], "tokens": [each[: arguments.steps] for each in tokens]},
    }
    return result | ({"eps": eps, **counted()} if eps else {})


def compare(results: dict[str, dict], outputs: dict[str, Outputs]) -> None:
    """Adds to each engine's results how long its outputs are those of FLASH_ATTN, where that has run."""
    for name in results.keys() & outputs.keys() - {PEER} if PEER in outputs else ():
        found = agreement(outputs[name], outputs[PEER])
        results[name]["agreement"] = {
            "same": found.same,
            "median": statistics.median(found.agreed),
            "mean": statistics.fmean(found.agreed),
            "of_tokens": found.of_tokens,
        }


def outputs_beside(out: Path) -> Path:
    return out.with_suffix(".outputs.json")


def table_of(files: list[Path]) -> str:
    """The table of all files together, with the outputs that lie beside them compared."""
    results = {name: each for path in files for name, each in kept(path).items()}
    compare(results, read(path for path in map(outputs_beside, files) if path.exists()))
    return table(results)


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
        outputs = outputs_beside(arguments.out or Path(scratch) / "results.json")
        found = kept(outputs)
        with Engines({engine: [*command, "--one", engine] for engine in missing}) as engines:
            prompts.write_text(json.dumps(prompts_for(arguments)))  # while they import
            for engine in missing:
                result = engines.run(engine)
                found[engine] = result.pop("outputs")
                results[engine] = result | machine() | {"commit": arguments.commit}
                keep(outputs, found)
                compare(results, read([outputs]))
                keep(arguments.out, results)
                print(f"{engine}: {results[engine]['ms_per_token']:.2f} ms a token", flush=True)
        if arguments.out and PEER in found and len(found) > 1:
            text = markdown(read([outputs]), PEER, decoder(arguments.model))
            arguments.out.with_suffix(".differences.md").write_text(text)
    return results


def lengths(text: str) -> tuple[int, int]:
    """The shortest and the longest prompt of a text like 8192-32768, or 28000."""
    shortest, _, longest = text.partition("-")
    return int(shortest), int(longest or shortest)


def prompts_for(arguments: argparse.Namespace) -> list[list[int]]:
    from code_prompts import code_prompts
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    (shortest, longest), steps = arguments.tokens, max(arguments.requests - 1, 1)
    return code_prompts(tokenizer, [shortest + (longest - shortest) * i // steps for i in range(arguments.requests)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument(
        "--tokens", type=lengths, default=(28000, 28000), metavar="N[-M]", help="of each prompt; from N to M"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=ENGINES, help="of " + ", ".join(ENGINES))
    add_arguments(parser)
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="JSON", help="print the table of files, and measure nothing"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table_of(arguments.table))
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
