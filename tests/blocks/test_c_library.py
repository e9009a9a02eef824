"""Where there are AVX2 and a C compiler all kernels are there: else their tests would be skipped, and nobody knew."""

import shutil
from collections.abc import Callable

import pytest
import torch

from p2pswarm.blocks.attention_kernel import AttentionKernel, find_attention_kernel
from p2pswarm.blocks.c_library import COMPILERS
from p2pswarm.blocks.column_kernel import ColumnKernel, find_column_kernel
from p2pswarm.blocks.quantized_kernel import NoKernel, find_kernel

CAN_COMPILE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and any(map(shutil.which, COMPILERS))

pytestmark = pytest.mark.skipif(not CAN_COMPILE, reason="needs AVX2 and a C compiler")


@pytest.mark.parametrize(
    ("find", "kind"), [(find_column_kernel, ColumnKernel), (find_attention_kernel, AttentionKernel)]
)
def test_a_kernel_is_compiled_where_it_can_be(find: Callable[[], object], kind: type) -> None:
    assert isinstance(find(), kind)


def test_the_kernel_of_quantized_layers_is_compiled_where_it_can_be() -> None:
    assert not isinstance(find_kernel(), NoKernel)
