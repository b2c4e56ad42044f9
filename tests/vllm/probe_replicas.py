"""Runs several engines of one model with lists, as a server does with data parallelism, and reports what they did.

Input: {"engine": arguments of AsyncEngineArgs, "prompts", "sampling"}. Every prompt is answered by each engine, all at
the same time. Output: the tokens, for each prompt by each engine, and the text that the server's `/metrics` would have.
"""

import asyncio
import json
import sys

from processes import report


async def answer(engine, prompt: list[int], params, replica: int) -> list[int]:
    """The tokens that follow by the engine of that number."""
    request = f"{replica} {len(prompt)}"
    async for output in engine.generate(
        {"prompt_token_ids": prompt}, params, request_id=request, data_parallel_rank=replica
    ):
        last = output
    return list(last.outputs[0].token_ids)


async def main(request: dict) -> dict:
    from prometheus_client import generate_latest
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(**request["engine"])
    params = SamplingParams(**request["sampling"], output_kind=RequestOutputKind.CUMULATIVE)
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        replicas = range(arguments.data_parallel_size)
        asked = [answer(engine, prompt, params, replica) for prompt in request["prompts"] for replica in replicas]
        tokens = await asyncio.gather(*asked)
        await asyncio.sleep(2.5)  # until the workers have written what they counted
        return {"tokens": tokens, "metrics": generate_latest().decode()}
    finally:
        engine.shutdown()


if __name__ == "__main__":
    report(asyncio.run(main(json.load(sys.stdin))))
