"""What an operator sets of decoding from listed pages, and how it is read.

`--additional-config '{"lite_attention": {"eps": 0.02}}'`, `LLM(additional_config={"lite_attention": ...})`, or
variables of the environment, one for each field: LITE_ATTENTION_EPS and so on. Field by field an argument wins over a
variable. The process that is started reads both and leaves the result in `vllm_config.additional_config`, which vLLM
hands to its workers.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from lite_attention.layer_eps import LayerEps

KEY = "lite_attention"
PREFIX = "LITE_ATTENTION_"
_READ_ELSEWHERE = (
    "CACHE",
    "DEVICE",
    "FA3",
    "METRICS_DIR",
    "SKIP_CUDA_BUILD",
    "TEST_MODEL",
)  # in this project, after the prefix

Eps = Annotated[StrictFloat | StrictInt, Field(ge=0, lt=1)]


class PageSettings(BaseModel):
    """Decoding reads the pages of the KV cache that the present queries need. Off unless asked for.

    Attributes:
        pages: whether it does. Without it, giving an `eps` or a `layer_eps` turns it on.
        eps: the share of softmax mass that a KV head's list of pages may leave out, by estimate, for each of its query
            heads: 0 to below 1. 0 is off: dense attention, bit for bit, and no memory for sketches.
        min_context: requests with fewer tokens than this are attended to densely.
        newest: that many of the newest tokens are always read.
        dense_layers: layers by index that stay dense and keep no sketches; from the end where negative.
        layer_eps: by index, from the end where negative, the eps of layers that don't take `eps`. With 0 a layer lists
            everything, dense to the bit, and keeps its sketches.
        sketch_bits: of a channel in the sketch of a page: 12, 8 of the mean of its keys but one, and 4 of
            that one, or 8, 4 of each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pages: StrictBool | None = None
    eps: Eps = 0.02
    min_context: Annotated[StrictInt, Field(ge=0)] = 4096
    newest: Annotated[StrictInt, Field(ge=1)] = 64
    dense_layers: tuple[StrictInt, ...] = ()
    layer_eps: dict[int, Eps] = {}  # keys as JSON has them, too: "3"
    sketch_bits: Literal[12, 8] = 12

    @property
    def enabled(self) -> bool:
        given = "eps" in self.model_fields_set or bool(self.layer_eps)
        asked = given if self.pages is None else self.pages
        return asked and self.eps > 0

    def own_eps(self, layer: int, layers: int) -> float | None:
        """What `layer_eps` has for this layer, of so many; None where it takes `eps`."""
        own = self.layer_eps.get(layer, self.layer_eps.get(layer - layers))
        return None if own is None else float(own)


def resolve(additional_config: object, environment: Mapping[str, str] = os.environ) -> PageSettings:
    """The settings that `additional_config` and the environment ask for.

    Raises:
        ValueError: a key that is not one of `PageSettings`, a value out of its range, or a file of `layer_eps` that
            can't be read or was made with other sketches; the message names the argument or the variable, what it was
            given, and what works.
    """
    arguments = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"additional_config[{KEY!r}]: got {arguments!r}; needs an object of {_fields()}")
    texts = {name: environment.get(_variable(name)) for name in PageSettings.model_fields}
    values = {name: _parsed(name, text) for name, text in texts.items() if text} | dict(arguments)
    where, found = _where("layer_eps", "layer_eps" in arguments), None
    if isinstance(path := values.get("layer_eps"), str):
        found = _read(path, where)
        values["layer_eps"] = found.eps  # not its path: workers may run where there is no such file
    try:
        settings = PageSettings.model_validate(values)
    except ValidationError as error:
        wrong = {str(each["loc"][0]): _given(values, each["loc"]) for each in error.errors()}
        raise ValueError("; ".join(_told(name, value, name in arguments) for name, value in wrong.items())) from None
    if found is not None and settings.pages is not False:
        _check_bits(found, settings.sketch_bits, path, where)
    if settings.layer_eps and settings.eps == 0 and settings.pages is not False:
        raise ValueError(
            f"{where}: got layers with an eps of their own where eps is 0, which is dense attention in all; needs an "
            "eps above 0, or 'pages' false"
        )
    return settings


def of(vllm_config: VllmConfig) -> PageSettings:
    """The settings of an engine, in any of its processes."""
    return resolve(vllm_config.additional_config)


def keep(vllm_config: VllmConfig) -> PageSettings:
    """Resolves the settings, once and for all processes of an engine, into its configuration.

    Raises:
        ValueError: as `resolve`, and for layers that the model hasn't, or that are named twice.
    """
    settings = of(vllm_config)
    if settings.enabled:
        layers = vllm_config.model_config.get_total_num_hidden_layers()
        _check_layers(settings, layers)
    if isinstance(vllm_config.additional_config, dict):
        kept = settings.model_dump(mode="json") | {"pages": settings.enabled}
        vllm_config.additional_config = {**vllm_config.additional_config, KEY: kept}
    return settings


def given(vllm_config: VllmConfig) -> bool:
    """Whether an argument or a variable sets anything."""
    config = vllm_config.additional_config
    variables = map(_variable, PageSettings.model_fields)
    return (isinstance(config, dict) and KEY in config) or any(map(os.environ.get, variables))


def unread(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What to tell of each variable that has the prefix and that nothing reads: as of one that is misspelled."""
    names = [_variable(name) for name in PageSettings.model_fields]
    known = {*names, *(PREFIX + name for name in _READ_ELSEWHERE)}
    told = []
    for name in sorted(name for name in environment if name.startswith(PREFIX) and name not in known):
        # Without the prefix, which makes all names alike.
        close = difflib.get_close_matches(name.removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in names], 1)
        meant = f"did you mean {PREFIX}{close[0]}?" if close else f"there are {', '.join(names)}"
        told.append(f"{name} is ignored: no setting has this name; {meant}")
    return told


def _parsed(name: str, text: str) -> Any:
    """A variable's text as JSON, lists without brackets too; else as it is, for pydantic to refuse."""
    listing = name == "dense_layers" and not text.lstrip().startswith("[")
    try:
        return json.loads(f"[{text}]" if listing else text)
    except json.JSONDecodeError:
        return text


def _fields() -> str:
    return ", ".join(PageSettings.model_fields)


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _where(name: str, argument: bool) -> str:
    return f"additional_config[{KEY!r}][{name!r}]" if argument else _variable(name)


def _read(path: str, where: str) -> LayerEps:
    from lite_attention.layer_eps import read_layer_eps

    return read_layer_eps(path, where)


def _check_bits(found: LayerEps, bits: int, path: str, where: str) -> None:
    from lite_attention.layer_eps import check_bits

    check_bits(found, bits, path, where)


def _check_layers(settings: PageSettings, layers: int) -> None:
    if settings.dense_layers or settings.layer_eps:
        from lite_attention.layer_eps import check_layers

        check_layers(settings.layer_eps, settings.dense_layers, layers)


def _given(values: Mapping[str, Any], place: tuple[str | int, ...]) -> Any:
    """What was given for the field at a place of pydantic's; of a mapping the entry that is wrong."""
    value = values[place[0]]
    if isinstance(value, Mapping) and len(place) > 1:
        return {key: each for key, each in value.items() if str(key) == str(place[1])}
    return value


def _told(name: str, value: Any, argument: bool) -> str:
    """What was given where, and what works, for a field that pydantic refused."""
    if name not in _WORKS:
        return f"additional_config[{KEY!r}]: got the key {name!r}; needs one of {_fields()}"
    return f"{_where(name, argument)}: got {value!r}; needs {_WORKS[name]}"


_WORKS = {
    "pages": "true or false",
    "eps": "a number from 0, which is dense attention, to below 1",
    "min_context": "an integer of 0 or more, in tokens",
    "newest": "an integer of 1 or more, in tokens",
    "dense_layers": "a list of integers, the indices of layers",
    "layer_eps": "numbers from 0 to below 1 by the index of their layer, or the path of a TOML file that has them",
    "sketch_bits": "12, 8 of a channel's mean and 4 of the key apart, or 8, 4 of each",
}
