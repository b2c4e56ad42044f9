"""What decoding from listed pages costs a model in quality, measured through the functions that serve it.

`python -m lite_attention.quality MODEL TEXT...` and `lite-attention quality` run it; `--help` has the options.

- `setting`: dense, or lists with a budget. `paged`: the KV cache of a layer. `decoder`: a Hugging Face model over such
  caches, by transformers' registry of attention. `tally`: bytes read and mass left out.
- `calibrate`: an eps for each layer, by what it does to the output; `budgets`: the choice.
- `texts`: windows of tokens. `loss`, `retrieval`, `generation`: the three measurements.
- `results`, `table`, `picture`, `screen`, `command`: what is reported, and where.
"""
