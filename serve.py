"""Serves a model: `python serve.py [--config configs/serve/smol.yaml] [key=value ...]`."""

import sys

from minigpt4_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
