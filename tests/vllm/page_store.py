"""A KV connector for tests: files with the keys and values of pages, by the tokens up to their end. No sketches.

`kv_connector_extra_config`: "folder"; "does", one of
- "save": stores the first 40 pages of prompts as they fill, and loads nothing;
- "load": loads a layer's pages when the layer waits for them, as late as vLLM allows;
- "load ahead": loads between steps, while the request waits;
and "damages": which of the first pages that it loads arrives damaged, with huge keys, and is reported.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

PAGE, STORED = 16, 40


def names(tokens: list[int]) -> list[str]:
    """Of the full pages of a prompt."""
    ends = range(PAGE, len(tokens) + 1, PAGE)
    return [hashlib.sha256(str(tokens[:end]).encode()).hexdigest() for end in ends[:STORED]]


@dataclass
class Moves(KVConnectorMetadata):
    """Of one step: file and page."""

    saves: list[tuple[str, int]] = field(default_factory=list)
    loads: list[tuple[str, int]] = field(default_factory=list)
    loading: list[str] = field(default_factory=list)  # requests that wait for them


class PageStore(ExampleConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._folder, self._does = Path(options["folder"]), options["does"]
        self._damages: int | None = options.get("damages")
        self._layers = vllm_config.compilation_config.static_forward_context
        self._next = Moves()
        self._blocks: dict[str, list[int]] = {}
        self._prompts: dict[str, list[int]] = {}
        self._damaged: set[int] = set()
        self._arrived: set[str] = set()

    # In the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if self._does == "save":
            return 0, False
        ahead, found = self._does == "load ahead", 0
        for name in names(request.prompt_token_ids if ahead else request.prompt_token_ids[:-1]):
            if not (self._folder / name).exists():
                break
            found += PAGE
        more = max(found - num_computed_tokens, 0)
        return more, ahead and more > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens == 0:
            return
        pages, (block_ids,) = names(request.prompt_token_ids), blocks.get_block_ids()
        last = self.get_num_new_matched_tokens(request, 0)[0] // PAGE
        first = last - num_external_tokens // PAGE
        self._next.loads += zip(pages[first:last], block_ids[first:last], strict=True)
        self._next.loading.append(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Moves:
        step, cached = scheduler_output, scheduler_output.scheduled_cached_reqs
        starts = {}
        for new in step.scheduled_new_reqs:
            self._prompts[new.req_id], self._blocks[new.req_id] = new.prompt_token_ids, list(new.block_ids[0])
            starts[new.req_id] = new.num_computed_tokens
        for name, blocks, start in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            starts[name] = start
            if blocks is not None:
                self._blocks[name] += blocks[0]
        if self._does == "save":
            for name, start in starts.items():
                filled = range(start // PAGE, (start + step.num_scheduled_tokens[name]) // PAGE)
                pages = names(self._prompts[name])
                self._next.saves += [(pages[i], self._blocks[name][i]) for i in filled if i < len(pages)]
        moves, self._next = self._next, Moves()
        return moves

    # In the worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._does == "load ahead":
            for layer in self._layers:
                self._load(layer)
            self._arrived |= set(self._get_connector_metadata().loading)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._does == "load":
            self._load(layer_name)

    def _load(self, layer_name: str) -> None:
        cache = self._layers[layer_name].kv_cache
        loads = self._get_connector_metadata().loads
        if self._damages is not None and loads:
            self._damaged, self._damages = {loads[self._damages][1]}, None
        for name, page in loads:
            cache[page] = 1e4 if page in self._damaged else torch.load(self._folder / name / layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        for name, page in self._get_connector_metadata().saves:
            (self._folder / name).mkdir(parents=True, exist_ok=True)
            torch.save(kv_layer[page].clone(), self._folder / name / layer_name)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str] | None]:
        arrived, self._arrived = self._arrived, set()
        return None, arrived or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        damaged, self._damaged = self._damaged, set()
        return damaged
