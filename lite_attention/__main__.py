"""`python -m lite_attention` is the `lite-attention` command."""

from lite_attention.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
