"""Trains the projection: `python train.py --config configs/train/smol_stage1.yaml [key=value ...]`."""

import sys

from minigpt4_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
