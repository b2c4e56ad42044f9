"""LiteAttention in a transformer of Hugging Face's diffusers.

    import lite_attention.diffusers

    lite_attention.diffusers.enable(pipe.transformer, threshold=-10.0, num_steps=50)

Each self-attention of the transformer gets a `LiteAttention` of its own, as the submodule `lite_attention` of the
diffusers attention module; what it computes there is called through diffusers' registry of attention backends.
Cross-attention stays with the backend that it has. `disable` undoes it.

Streams: a list belongs to a trajectory, so the conditional and the unconditional pass must not share one. diffusers'
pipelines say which pass it is by `transformer.cache_context("cond")` and `("uncond")`, and that is the stream. In a
loop of your own use `cache_context` too, or `stream(transformer, "cond")`. Passes that go through as one batch need
nothing: each entry of a batch has rows of its own. A loop that makes two passes a step and names neither would mix
their lists.

Prompts: with `num_steps`, the calls that each stream makes for a prompt, the call after the last starts afresh. Where
the pipeline tells its `step_index` by `cache_context`, as Wan's does, a step that doesn't come after the last one
starts afresh too, with `num_steps` or without. `reset` does it by hand, as after an interrupted prompt.

- `transformer`: putting it in and taking it out. `session`: the streams of one transformer. `backend`: the function in
  diffusers' registry.
"""

from lite_attention.diffusers.transformer import disable, enable, reset, stream

__all__ = ["disable", "enable", "reset", "stream"]
