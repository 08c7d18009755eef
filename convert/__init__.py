"""Weights of other programs -> this project's parameter tree, and back. `python -m convert --help` shows the commands.

For: reading GGUF, ONNX, safetensors and PyTorch files, and binding every tensor by a table of rules (`rules.py`).
Not for: running a model. Only `against_torch.py` computes a forward pass, to compare it.

Differs from the original, which loads everything with `strict=False` and prints nothing: here a tensor that no rule
uses, or a parameter that no rule fills, stops the conversion.
"""

from convert.problems import ConversionError
from convert.rules import Conversion, Excuse, Op, Rule, convert
from convert.sources import ArraySource, TensorSource, open_source

__all__ = [
    "ArraySource",
    "Conversion",
    "ConversionError",
    "Excuse",
    "Op",
    "Rule",
    "TensorSource",
    "convert",
    "open_source",
]
