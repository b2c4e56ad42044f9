"""Reads GGUF files: metadata, and tensors dequantised to float32.

The format is specified in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is a header, key-value
metadata, a table of tensors, and the tensors' data at aligned offsets, all little endian. Quantised tensors are rows of
blocks of 32 weights w:

    Q4_1    fp16 scale, fp16 minimum, 16 bytes that hold q[i] in their low and q[i + 16] in their high half:
            w = q * scale + minimum
    Q8_0    fp16 scale, 32 int8 q:
            w = q * scale

Only the tensor types that the project's demo model uses are read; any other is refused by name.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_BLOCK = 32

# Metadata value types, by their number in the file.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFError(ValueError):
    """The file is not a GGUF file, is damaged, or holds what this reader does not read."""


@dataclass(frozen=True)
class TensorType:
    """How a tensor is stored: `block` weights in `nbytes` bytes, and the function that turns blocks into weights."""

    name: str
    block: int
    nbytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def _decode_f32(raw: np.ndarray) -> np.ndarray:
    return raw.view("<f4").astype(np.float32)


def _decode_q4_1(raw: np.ndarray) -> np.ndarray:
    scale, minimum = raw[:, 0:2].view("<f2").astype(np.float32), raw[:, 2:4].view("<f2").astype(np.float32)
    packed = raw[:, 4:]
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32) * scale + minimum


def _decode_q8_0(raw: np.ndarray) -> np.ndarray:
    return raw[:, 2:].view(np.int8).astype(np.float32) * raw[:, 0:2].view("<f2").astype(np.float32)


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4, _decode_f32),
    3: TensorType("Q4_1", _BLOCK, 20, _decode_q4_1),
    8: TensorType("Q8_0", _BLOCK, 34, _decode_q8_0),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place in the file. `shape` is in PyTorch's order, slowest dimension first; the file has it reverse."""

    shape: tuple[int, ...]
    type_id: int
    offset: int

    def type(self) -> TensorType:
        if self.type_id not in TENSOR_TYPES:
            known = ", ".join(t.name for t in TENSOR_TYPES.values())
            raise GGUFError(f"tensor type {self.type_id} is not supported, only {known} are")
        return TENSOR_TYPES[self.type_id]


class _Cursor:
    """Reads consecutive values of the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def take(self, nbytes: int) -> bytes:
        if nbytes > len(self.data) - self.position:
            raise GGUFError(f"the file ends inside of its header, at byte {len(self.data)}")
        self.position += nbytes
        return self.data[self.position - nbytes : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            element, count = self.scalar("I"), self.scalar("Q")
            return [self.value(element) for _ in range(count)]
        if type_id not in _SCALARS:
            raise GGUFError(f"unknown metadata type {type_id} before byte {self.position}")
        return self.scalar(_SCALARS[type_id])


class GGUFFile:
    """An opened GGUF file. `metadata` maps keys to Python values, `tensors` names to their `TensorInfo`.

    The file is mapped, not read: use this as a context manager. Raises GGUFError where the file is not GGUF of version
    2 or 3, or ends early.
    """

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            try:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise GGUFError(f"{path} is empty") from error
        cursor = _Cursor(self._data)
        magic = cursor.take(len(_MAGIC))
        if magic != _MAGIC:
            raise GGUFError(f"{path} is not a GGUF file: it starts with {magic!r}")
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            raise GGUFError(f"{path} is GGUF version {version}, only {_VERSIONS} are supported")
        tensor_count, metadata_count = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        self.tensors: dict[str, TensorInfo] = {}
        for _ in range(tensor_count):
            name = cursor.string()
            dims = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
            self.tensors[name] = TensorInfo(tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        self._data_start = -(-cursor.position // alignment) * alignment

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def tensor(self, name: str) -> np.ndarray:
        """The tensor `name` as a new float32 array.

        Raises KeyError where there is none, GGUFError where its type is not read or the file is too short.
        """
        info = self.tensors[name]
        kind = info.type()
        blocks, rest = divmod(int(np.prod(info.shape)), kind.block)
        if rest or info.shape[-1] % kind.block:
            raise GGUFError(
                f"tensor {name}: rows of {info.shape[-1]} weights are not whole {kind.name} blocks of {kind.block}"
            )
        start = self._data_start + info.offset
        raw = self._data[start : start + blocks * kind.nbytes]
        if len(raw) != blocks * kind.nbytes:
            raise GGUFError(f"tensor {name}: the file ends inside of its data")
        return kind.decode(np.frombuffer(raw, np.uint8).reshape(blocks, kind.nbytes)).reshape(info.shape)
