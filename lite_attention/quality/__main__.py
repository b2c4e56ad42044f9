"""`python -m lite_attention.quality` is `lite-attention quality`."""

import argparse

from lite_attention.quality.command import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lite_attention.quality", description=run.__doc__)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
