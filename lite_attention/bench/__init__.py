"""The benchmark: LiteAttention beside its peers, checked first, then timed in turns.

`python -m lite_attention.bench` and `lite-attention bench` run it; `--help` has the options.
"""
