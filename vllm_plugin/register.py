"""vLLM's entry points: what each of its processes runs at start, whether LITE_ATTENTION is chosen or not.

`platform_plugin` runs when vLLM first asks which device it is on. That is before any configuration is parsed, so it is
there that the name enters `AttentionBackendEnum`. `general_plugin` runs later, once vLLM's own modules are there to be
hooked into. Both may run any number of times. This module imports nothing but the standard library, and its functions
only what vLLM has loaded by then: start-up costs next to nothing where another backend serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

NAME = "LITE_ATTENTION"
CLASS_PATH = "vllm_plugin.backend.LiteAttentionBackend"


def backend_member() -> AttentionBackendEnum:
    """The member LITE_ATTENTION of vLLM's `AttentionBackendEnum`, added on the first call.

    An enum takes no new members by its public interface, and vLLM's own `register_backend` knows new names only from
    0.32 on. The member also pickles as a call of this function: a process that was spawned unpickles vLLM's
    configuration before it loads any general plugin, and a lookup by name or value could come too early there.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if NAME in AttentionBackendEnum.__members__:
        return AttentionBackendEnum[NAME]
    member = object.__new__(AttentionBackendEnum)
    member._name_ = NAME
    member._value_ = CLASS_PATH
    member.__objclass__ = AttentionBackendEnum
    member._sort_order_ = len(AttentionBackendEnum.__members__)
    member.__reduce_ex__ = _reduce_member
    setattr(AttentionBackendEnum, NAME, member)  # before it is a member: an enum refuses to have its members assigned
    AttentionBackendEnum._member_names_.append(NAME)
    AttentionBackendEnum._member_map_[NAME] = member
    AttentionBackendEnum._value2member_map_[CLASS_PATH] = member
    return member


def _reduce_member(protocol: int) -> tuple[Any, tuple[()]]:
    return backend_member, ()


def platform_plugin() -> None:
    """Entry point of `vllm.platform_plugins`: adds the name, and by returning None brings no platform of its own."""
    backend_member()


def general_plugin() -> None:
    """Entry point of `vllm.general_plugins`: makes the choice by environment variable work, and the backend on the CPU.

    VLLM_TARGET_DEVICE=cpu makes vLLM skip all platform plugins, so the name is added here too.
    """
    backend_member()
    from vllm.platforms import current_platform

    from vllm_plugin import selection

    selection.install()
    if current_platform.is_cpu():
        from vllm_plugin import cpu_platform

        cpu_platform.install(type(current_platform))
