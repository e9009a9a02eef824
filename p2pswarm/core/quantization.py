"""How a server holds its weights in memory: as in the checkpoint, or in fewer bits. Knows the names only."""

from enum import Enum


class Quantization(Enum):
    """The formats are those of bitsandbytes; the values are announced and are what `--quant` takes."""

    NONE = "none"
    INT8 = "int8"
    """Eight bits a weight, and one scale for each output of a layer."""
    NF4 = "nf4"
    """Four bits a weight, spaced as a normal distribution wants, and one scale for each 64 weights."""
