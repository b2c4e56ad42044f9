"""Builds engine configurations in the ways that users have, and reports which backend each chose.

Input: a list of {"argv" or "kwargs", "environment"}. Output: for each, the backend or the error, what was logged, and
whether the arguments are as they were; and the modules that are loaded in the end.
"""

import json
import logging
import os
import sys

from processes import report
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def engine_args(case: dict) -> EngineArgs:
    if "argv" in case:
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        return AsyncEngineArgs.from_cli_args(parser.parse_args(case["argv"]))
    kwargs = dict(case["kwargs"])
    if config := kwargs.pop(
        "AttentionConfig", None
    ):  # what LLM(attention_config={...}) makes before it makes EngineArgs
        kwargs["attention_config"] = AttentionConfig(**config)
    return EngineArgs(**kwargs)


def probe(case: dict) -> dict:
    os.environ.pop("VLLM_ATTENTION_BACKEND", None)
    os.environ.update(case.get("environment", {}))
    handler = Lines()
    logging.getLogger("vllm").addHandler(handler)
    try:
        args = engine_args(case)
        before = args.attention_backend
        backend = args.create_engine_config().attention_config.backend
        result = {"backend": backend and backend.name, "unchanged": args.attention_backend == before}
    except (ValueError, SystemExit) as error:
        result = {"error": str(error)}
    finally:
        logging.getLogger("vllm").removeHandler(handler)
    return result | {"log": handler.lines}


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    probe(cases[0])  # the first configuration sets up vLLM's logging, and takes our handler away
    results = [probe(case) for case in cases]
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    report(
        {
            "results": results,
            "modules": sorted(sys.modules),
            "backends": list(AttentionBackendEnum.__members__),
            "platform": type(current_platform).__name__,
        }
    )
