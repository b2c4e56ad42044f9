"""Skip lists: KV tiles that proved negligible in one call are left out of the next, before their keys are loaded.

The idea is of the LiteAttention paper (arXiv 2511.11062): from one step of a diffusion model to the next, what is
negligible stays so.

- `reference`: what a call with a list means; the other backends give its answers.
- `skip_list`: the list, `SkipList`. `tiles`: the shapes of its tiles. `bits`: its words.
- `ranges`: ranges of tokens that are always or never visited, as masks of tiles.
- `interface`: the public functions. `checks`, `hopper`: what they refuse.
- `problem`, `cpu`, `op`: a call as a backend gets it, the CPU path, the torch custom op.
- `state`, `saved`, `stats`: what `lite_attention.module` keeps of a stream of calls, in a file, in numbers.
"""
