"""`LiteAttention`: attention with skip lists as a module, which keeps a list for each stream of calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lite_attention import ops
from lite_attention.checks import Problem, check_inference, prepare, wrong
from lite_attention.skip.checks import check_features
from lite_attention.skip.interface import attend
from lite_attention.skip.ranges import Ranges
from lite_attention.skip.saved import FOLDER, Saved, read_all
from lite_attention.skip.skip_list import SkipList
from lite_attention.skip.state import StreamState
from lite_attention.skip.stats import StreamStats, stats_of

DEFAULT_STREAM = "default"


class LiteAttention(nn.Module):
    """Attention of one layer that leaves out what proved negligible in the calls before.

    It is for calls that resemble each other, as the denoising steps of a diffusion model do. Each call visits the KV
    tiles of a skip list and takes those off it that proved negligible, as `skip_attention` says. The first call visits
    all tiles.

    A list belongs to a stream of calls, which has a name: `stream="cond"` and `stream="uncond"` for classifier-free
    guidance, an expert, a request. Streams share nothing. A stream starts a fresh list

    - where the shape of q or k, the dtype or the device is not that of its last call: with each other batch size too;
    - with `num_steps`, at the first call of every `num_steps`: without a reset, the next prompt doesn't get this one's;
    - at `reset_skip_state`.

    The rows of a batch are rows of the list: one that moves to another place in the batch needs `reorder_batch`.

    The module has no parameters, and `.to()` and `.half()` leave its lists alone: they are where q is, also when a
    model is moved off the GPU between two steps. It is for inference, and works in `torch.inference_mode`.

    - `torch.compile`: a call is one graph (fullgraph=True); the first call of a stream compiles another, which makes
      the list. Compiled calls of a stream are all in `inference_mode`, or none. `mode="reduce-overhead"` needs one call
      of each stream before, outside of the compiled function, since it reuses the memory of what is made inside.
    - CUDA graphs: make one call of each stream before the capture. A replay counts as a call; `set_threshold` and
      `reset_skip_state` between replays have effect.
    - `copy.deepcopy` copies the lists.

    Idea: LiteAttention, arXiv 2511.11062.

    Args:
        enable_skipping: False computes dense attention, until `enable_skip_optimization(True)`.
        threshold: at most 0, in log2 units: -10 takes off the list what weighs less than 2**-10 of the largest weight
            seen before it; nearer to 0 skips more, -inf skips nothing. A number, one for each query head, or a tensor
            (num_steps, num_heads): one for each head at each step.
        causal, window_size: as in `flash_attn_func`.
        num_steps: calls of a stream in one sequence, as a pipeline has denoising steps for a prompt.
        refresh_every: all tiles are visited again, and vote, in every call of this distance, from the first on.
        stats_steps: how many of the last calls of each stream `stats` can tell of; 0 records nothing. A recorded call
            costs some microseconds on the GPU, and waits for nothing.
        save_state: whether `state_dict` has the lists, as tensors, and `load_state_dict` takes
            them: a stream's next call goes on from there, if it is of the same shapes, dtype and tiles.
        tile: (block_m, block_n), tokens of q and keys of a tile; None is the Hopper kernel's for the head dim, which it
            needs.
        backend: as in `flash_attn_func`.
        name: of the layer, in `collect_stats` and pictures; None is the module's place in the model.

    Raises:
        ValueError: an argument out of range; the message names it, what was given, and what works.
    """

    def __init__(
        self,
        enable_skipping: bool = True,
        threshold: float | Sequence[float] | Tensor = -10.0,
        *,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        num_steps: int | None = None,
        refresh_every: int | None = None,
        stats_steps: int = 0,
        save_state: bool = False,
        tile: tuple[int, int] | None = None,
        backend: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.window_size = window_size
        self.num_steps = _calls("num_steps", num_steps)
        self.refresh_every = _calls("refresh_every", refresh_every)
        if not _is_int(stats_steps) or stats_steps < 0:
            raise wrong("stats_steps", stats_steps, "0 or a positive int")
        self.stats_steps = stats_steps
        self.save_state = save_state
        self.tile = tile
        self.backend = backend
        self.name = name
        # Not buffers: a cast or a move of the model must not reach them, and state_dict has them only where asked.
        self._states: dict[str, StreamState] = {}
        self._loaded: dict[str, Saved] = {}  # whose streams had no call since
        self._threshold = _threshold(threshold, num_steps)
        self.enable_skip_optimization(enable_skipping)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        return_softmax_lse: bool = False,
        must_do_list: Ranges | None = None,
        must_skip_list: Ranges | None = None,
        *,
        stream: str = DEFAULT_STREAM,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of a batch of sequences of one length.

        Args:
            q: (batch, seqlen_q, num_heads, head_dim), bfloat16 or float16; float32 too on the CPU and for the
                reference.
            k, v: (batch, seqlen_k, num_heads_k, head_dim); num_heads_k divides num_heads.
            scale: factor on q.k, positive; None is 1 / sqrt(head_dim).
            return_softmax_lse: return lse too.
            must_do_list: token ranges of the keys that are always visited, rounded outward to tiles: (begin, end) pairs
                for all batch entries, a sequence of pairs for each, or a tensor, as `SkipList.must_do_mask` says.
            must_skip_list: token ranges that are never visited, rounded inward to tiles, also while skipping is
                disabled. In a tile of both must_do_list wins.
            stream: whose list it is.

        Returns:
            out (batch, seqlen_q, num_heads, head_dim) in the dtype of q; with `return_softmax_lse` (out, lse), where
            lse is (batch, num_heads, seqlen_q), float32: the natural logarithm of each row's softmax denominator over
            the visited tiles.

        Raises:
            ValueError, NotImplementedError, RuntimeError: as `skip_attention` does. Such a call doesn't count as a
                step.
        """
        check_inference(q=q, k=k, v=v)
        check_features(q=q, k=k, v=v)
        problem = prepare(q, k, v, softmax_scale=scale, causal=self.causal, window_size=self.window_size)
        backend = ops.choose(problem, self.backend)  # which may refuse, so before the state changes
        state = self._state(problem, stream)
        do, skip = state.mask("must_do", must_do_list), state.mask("must_skip", must_skip_list)
        state.begin(self.num_steps, self.refresh_every)
        visits = state.skip_list if self.enable_skipping else state.skip_list.full()
        if self.stats_steps:
            state.record(visits, do, skip)
        if self.enable_skipping or skip is not None:
            attend(problem, visits, state.threshold_now(), do, skip, self.enable_skipping, backend)
        else:
            ops.launch(problem, backend)
        state.end()
        return (problem.out, problem.lse) if return_softmax_lse else problem.out

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that have a list."""
        return tuple(self._states)

    @property
    def threshold(self) -> Tensor:
        """A copy of the threshold, float32, (), (num_heads,) or (num_steps, num_heads)."""
        return self._threshold.clone()

    def skip_list(self, stream: str = DEFAULT_STREAM) -> SkipList:
        """The list of a stream as its last call left it; not a copy.

        Raises:
            ValueError: there was no call of this stream.
        """
        if stream not in self._states:
            raise wrong("stream", repr(stream), f"one that had a call: {', '.join(map(repr, self._states)) or 'none'}")
        return self._states[stream].skip_list

    def reset_skip_state(self, stream: str | None = None) -> None:
        """Starts a new sequence of calls: the next one visits all tiles. Of one stream, or with None of all.

        In place, so that CUDA graphs and compiled callers see it. For a stream without calls there is nothing to do.
        """
        self._forget_loaded(stream)
        for name, state in self._states.items():
            if stream is None or name == stream:
                with torch.inference_mode():  # where compiled calls may have made it
                    state.reset()

    def drop_skip_state(self, stream: str | None = None) -> None:
        """Frees the memory of a stream that has no more calls, as a request that is done, or with None of all.

        No CUDA graph that was captured with it may be replayed after.
        """
        self._forget_loaded(stream)
        if stream is None:
            self._states.clear()
        else:
            self._states.pop(stream, None)

    def reorder_batch(self, order: Tensor, stream: str = DEFAULT_STREAM) -> None:
        """Batch entry i of the next calls goes on with the list of entry `order[i]` of those before. In place.

        Args:
            order: int64, (batch,), on the device of the list; on a GPU its values are not read.

        Raises:
            ValueError: `order` is no such tensor, or there was no call of this stream.
        """
        bits = self.skip_list(stream).bits
        works = (bits.shape[0],)
        if not isinstance(order, Tensor) or order.dtype != torch.int64 or tuple(order.shape) != works:
            given = f"{order.dtype} of {tuple(order.shape)}" if isinstance(order, Tensor) else type(order).__name__
            raise wrong("order", given, f"a tensor of torch.int64 of {works}")
        if order.device != bits.device:
            raise wrong("order", f"a tensor on {order.device}", f"one on the device of the list, {bits.device}")
        with torch.inference_mode():
            bits.copy_(bits[order])

    def enable_skip_optimization(self, enable: bool = True) -> None:
        """Whether calls skip. At any time; a CUDA graph stays what it was when it was captured.

        Without, calls are dense: only `must_skip_list` leaves tiles out. Lists keep what they have and lose nothing;
        calls count as steps, and the first one of `num_steps` or of a refresh makes all tiles visited.
        """
        if not isinstance(enable, bool):
            raise wrong("enable_skipping", enable, "True or False")
        self.enable_skipping = enable

    def set_threshold(self, threshold: float | Sequence[float] | Tensor) -> None:
        """Another threshold for the calls to come, of all streams.

        In place on the device, so that CUDA graphs and compiled callers see it. What left a list doesn't come back.

        Args:
            threshold: as that of the module. A tensor is float32, (), (num_heads,) or (num_steps, num_heads); on a GPU
                its values are not checked.
        """
        new = _threshold(threshold, self.num_steps)
        for state in self._states.values():
            heads = state.threshold.shape[1]
            if new.dim() and new.shape[-1] != heads:
                raise wrong("threshold", f"{new.shape[-1]} values", f"one, or one for each of {heads} heads")
        self._threshold = new
        for state in self._states.values():
            with torch.inference_mode():
                if isinstance(threshold, (int, float)):
                    state.threshold.fill_(threshold)  # which doesn't wait for a copy from the CPU
                else:
                    state.threshold.copy_(new)

    def stats(self) -> dict[str, StreamStats]:
        """How much each stream skips. Waits for the GPU."""
        return {name: stats_of(state, self.num_steps) for name, state in self._states.items()}

    def extra_repr(self) -> str:
        settings = {
            "enable_skipping": self.enable_skipping,
            "threshold": self._threshold.tolist() if self._threshold.dim() < 2 else "by step and head",
            "causal": self.causal,
            "window_size": self.window_size,
            "num_steps": self.num_steps,
            "refresh_every": self.refresh_every,
            "streams": self.streams,
        }
        return ", ".join(f"{name}={value}" for name, value in settings.items())

    def _state(self, problem: Problem, stream: str) -> StreamState:
        if not isinstance(stream, str):
            raise wrong("stream", stream, "a name, as 'cond'")
        state = self._states.get(stream)
        if state is None or not state.serves(problem):
            state = StreamState.fresh(problem, self.tile, self._threshold, self.num_steps, self.stats_steps)
            self._states[stream] = state
        if self._loaded and stream in self._loaded:
            self._loaded.pop(stream).give(state)
        return state

    def _forget_loaded(self, stream: str | None) -> None:
        if stream is None:
            self._loaded.clear()
        else:
            self._loaded.pop(stream, None)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.save_state:
            return
        for stream, saved in ({name: Saved.of(state) for name, state in self._states.items()} | self._loaded).items():
            for entry, x in saved.entries().items():
                destination[f"{prefix}{FOLDER}{stream}.{entry}"] = x

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.save_state:
            return
        loaded, errors = read_all(state_dict, prefix)
        error_msgs += errors
        self._loaded |= loaded
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(prefix + FOLDER)]


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _calls(name: str, number: int | None) -> int | None:
    if number is not None and (not _is_int(number) or number < 1):
        raise wrong(name, number, "a positive int, or None")
    return number


def _threshold(threshold: float | Sequence[float] | Tensor, num_steps: int | None) -> Tensor:
    """A tensor of its own, float32, (), (num_heads,) or (num_steps, num_heads)."""
    works = "a number of at most 0, one for each head, or a float32 tensor (), (num_heads,) or (num_steps, num_heads)"
    if isinstance(threshold, Tensor):
        by_step = threshold.dim() == 2 and threshold.shape[0] == num_steps
        if threshold.dtype != torch.float32 or (threshold.dim() > 1 and not by_step):
            given = f"{threshold.dtype} of {tuple(threshold.shape)}, with num_steps={num_steps}"
            raise wrong("threshold", given, works)
        new = threshold.detach().clone()
    else:
        numbers = [threshold] if isinstance(threshold, (int, float)) else threshold
        if not isinstance(numbers, (list, tuple)) or not all(
            isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers
        ):
            raise wrong("threshold", threshold, works)
        new = torch.tensor(threshold, dtype=torch.float32, device="cpu")
    if new.device.type == "cpu" and not ((new >= -math.inf) & (new <= 0)).all():
        raise wrong("threshold", new.tolist(), works)
    return new
