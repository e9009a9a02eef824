"""Windows of adjacent blocks, compared by what their blocks have. Pure arithmetic on arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Throughputs = NDArray[Any]
"""Of each block of a model: [num_model_blocks], floats or whole numbers."""


def worst_window(throughputs: Throughputs, num_blocks: int) -> int:
    """The start of the window of `num_blocks` blocks that is served worst.

    Windows are compared by their worst block, then by their second worst and so on; ties go to the front.
    """
    windows = np.lib.stride_tricks.sliding_window_view(throughputs, num_blocks)
    worst_blocks = windows.min(axis=1)
    candidates = np.flatnonzero(worst_blocks == worst_blocks.min())  # most windows need not be sorted
    sorted_windows = np.sort(windows[candidates], axis=1).tolist()
    return int(candidates[min(range(len(candidates)), key=sorted_windows.__getitem__)])
