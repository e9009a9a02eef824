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
    sorted_windows = np.sort(np.lib.stride_tricks.sliding_window_view(throughputs, num_blocks), axis=1)
    remaining = np.arange(len(sorted_windows))
    for column in sorted_windows.T:
        values = column[remaining]
        remaining = remaining[values == values.min()]
        if len(remaining) == 1:
            break
    return int(remaining[0])
