"""VLLM_ATTENTION_BACKEND=LITE_ATTENTION, which vLLM has not read since 0.15; and the log line that says who chose.

What the command line or `LLM(...)` asks for wins over the variable. Values that name other backends are left to vLLM.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from enum import Enum
from typing import Any

from vllm_plugin.register import NAME, backend_member

VARIABLE = "VLLM_ATTENTION_BACKEND"
# Of `settings`, which other backends need not load.
_TURN_ON = ("LITE_ATTENTION_EPS", "LITE_ATTENTION_LAYER_EPS", "LITE_ATTENTION_PAGES")

logger = logging.getLogger(f"vllm.{__name__}")  # below "vllm", whose handlers and level vLLM configures
_told: set[str] = set()  # warnings of this process: a configuration may be made several times


def install() -> None:
    """Hooks the choice into `EngineArgs.create_engine_config`, through which every engine's configuration comes."""
    requested = environment_choice()
    module = sys.modules.get("vllm.engine.arg_utils")
    if module is None:
        # A worker: it has its configuration already. Only where the variable asks for us is the import worth its time.
        if not requested:
            return
        import vllm.engine.arg_utils as module
    if requested:
        import vllm.envs

        # Else vLLM warns of an unknown variable.
        vllm.envs.environment_variables.setdefault(VARIABLE, lambda: os.environ.get(VARIABLE))
    engine_args = module.EngineArgs
    if not hasattr(engine_args.create_engine_config, "chooses_lite_attention"):
        engine_args.create_engine_config = _choosing(engine_args.create_engine_config)


def environment_choice() -> bool:
    """Whether the environment asks for LITE_ATTENTION.

    Raises:
        ValueError: the value can only be a misspelling of the name. vLLM would serve with another backend.
    """
    value = os.environ.get(VARIABLE, "").strip().upper()
    if value.startswith("LITE") and value != NAME:
        raise ValueError(f"{VARIABLE}={os.environ[VARIABLE]} names no attention backend. Did you mean {NAME}?")
    return value == NAME


def _is_ours(backend: Any) -> bool:
    return (backend.name if isinstance(backend, Enum) else str(backend).upper()) == NAME


def _settled(vllm_config: Any) -> Any:
    """The engine's configuration, with the settings of lists checked and kept in it.

    Raises:
        ValueError: settings that are not valid.
    """
    attention = vllm_config.attention_config
    chosen = any(_is_ours(backend) for backend in (attention.backend, *attention.backend_per_kind.values()) if backend)
    config = vllm_config.additional_config
    asked = (isinstance(config, dict) and "lite_attention" in config) or any(map(os.environ.get, _TURN_ON))
    if not chosen and not asked:
        return vllm_config
    from vllm_plugin import settings

    for line in settings.unread():
        if line not in _told:
            _told.add(line)
            logger.warning("%s", line)
    if not settings.given(vllm_config) or not settings.keep(vllm_config).enabled:
        return vllm_config
    if chosen:
        from vllm_plugin import metrics

        metrics.announce()
    else:
        logger.warning(
            "additional_config[%r] and %s* are ignored: the attention backend is not %s.",
            settings.KEY,
            settings.PREFIX,
            NAME,
        )
    return vllm_config


def _choosing(create_engine_config: Any) -> Any:
    """Wraps `EngineArgs.create_engine_config` so that the variable stands in for a backend that was not given."""

    @functools.wraps(create_engine_config)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        sources = {
            "--attention-backend / attention_backend": self.attention_backend,
            "--attention-config / attention_config": getattr(self.attention_config, "backend", None),
        }
        explicit = next(((source, value) for source, value in sources.items() if value is not None), None)
        requested = environment_choice()
        if explicit is not None:
            source, value = explicit
            if _is_ours(value):
                logger.info("Attention backend %s, chosen by %s.", NAME, source)
            elif requested:
                name = value.name if isinstance(value, Enum) else value
                logger.warning("Attention backend %s, chosen by %s. %s=%s is ignored.", name, source, VARIABLE, NAME)
        elif requested:
            logger.info("Attention backend %s, chosen by the environment variable %s.", NAME, VARIABLE)
            self.attention_backend = backend_member()
            try:
                return _settled(create_engine_config(self, *args, **kwargs))
            finally:
                self.attention_backend = None  # the caller's arguments stay as they were given
        return _settled(create_engine_config(self, *args, **kwargs))

    wrapper.chooses_lite_attention = True
    return wrapper
