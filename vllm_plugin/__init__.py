"""LiteAttention as an attention backend of vLLM, chosen by the name LITE_ATTENTION.

Installing the package is enough: vLLM finds the entry points of `register` in every process it starts. Until the
backend is chosen it adds one name to vLLM's list of backends and nothing else; `lite_attention` and `backend`, `impl`
and `metadata` are imported only by a process that computes attention with it, and `lite_attention` by one that checks
which layers its settings name.
"""
