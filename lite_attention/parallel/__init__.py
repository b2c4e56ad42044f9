"""Attention of sequences that are split over ranks, with skip lists.

- `module`: `SeqParallelLiteAttention`.
- `ring`: keys and values go round the ranks (Ring Attention, arXiv 2310.01889). `merge`: results over parts of the keys
  become one.
- `ulysses`: tokens are exchanged for heads and back (DeepSpeed-Ulysses, arXiv 2309.14509).
- `agree`: whether all ranks have tensors of one shape.
"""
