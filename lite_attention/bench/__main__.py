"""`python -m lite_attention.bench` is `lite-attention bench`."""

import argparse

from lite_attention.bench.command import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lite_attention.bench", description=run.__doc__)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
