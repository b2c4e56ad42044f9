"""Decoding that reads only the pages of the KV cache that the present queries need.

- `reference`: what sketches, lists and attention over them mean; kernels are held against it.
- `interface`: the public functions. `checks`, `values`: what they refuse, by metadata and by what memory holds;
  `prepare`: a call from its arguments.
- `layout`: the bytes of a sketch. `estimate`: what a sketch says of a page. `lists`: `PageLists`.
- `scratch`: the memory that kernels take for a call.
- `problem`, `cpu`, `op`: a call as a backend gets it, the CPU path, the torch custom ops.
"""

from lite_attention.pages.interface import attend_pages, decode_pages, empty_sketch, select_pages, write_sketch
from lite_attention.pages.layout import PAGE, sketch_bytes
from lite_attention.pages.lists import PageLists
from lite_attention.pages.scratch import select_scratch_bytes

__all__ = [
    "PAGE",
    "PageLists",
    "attend_pages",
    "decode_pages",
    "empty_sketch",
    "select_pages",
    "select_scratch_bytes",
    "sketch_bytes",
    "write_sketch",
]
