"""Device and dtype are found, or refused with what to use instead."""

import pytest
import torch

from p2pswarm.core.errors import ConfigError
from swarmd.device import (
    DtypeChoice,
    choose_dtype,
    describe_choice,
    device_name,
    find_device,
    largest,
    note_on_other_devices,
    set_threads,
)


@pytest.mark.parametrize(
    ("wanted", "checkpoint", "device", "chosen"),
    [
        ("auto", torch.bfloat16, "cuda", torch.bfloat16),
        ("auto", torch.float16, "cuda", torch.float16),
        ("auto", torch.float32, "cpu", torch.float32),
        ("auto", torch.bfloat16, "cpu", torch.bfloat16),
        ("auto", torch.float16, "cpu", torch.float32),
        ("auto", torch.float16, "mps", torch.float16),
        ("float32", torch.bfloat16, "cpu", torch.float32),
        ("bfloat16", torch.float32, "cpu", torch.bfloat16),
        ("float16", torch.float32, "mps", torch.float16),
    ],
)
def test_the_dtype_is_the_one_asked_for_or_the_checkpoints(
    wanted: str, checkpoint: torch.dtype, device: str, chosen: torch.dtype
) -> None:
    assert choose_dtype(wanted, checkpoint, device) == DtypeChoice(chosen)


@pytest.mark.parametrize("stored", [torch.float64, torch.float8_e4m3fn])
def test_a_dtype_that_nothing_computes_in_becomes_float32_with_a_warning(stored: torch.dtype) -> None:
    name = str(stored).removeprefix("torch.")
    warning = f"the checkpoint is stored as {name}: computing in float32"
    assert choose_dtype("auto", stored, "cpu") == DtypeChoice(torch.float32, warning)


def test_of_uneven_devices_the_largest_is_taken_and_the_operator_told() -> None:
    gib = 1 << 30
    assert largest([3 * gib, 22 * gib, 8 * gib]) == 1
    assert largest([8 * gib, 8 * gib]) == 0
    assert describe_choice(1, [8 * gib, 22 * gib]) == (
        "computing on cuda:1 alone, of cuda:0 8.0 GiB, cuda:1 22 GiB: start a server for each of the others "
        "(--device cuda:N)"
    )
    assert describe_choice(0, [8 * gib]) is None


def test_one_cpu_needs_no_note_on_other_devices() -> None:
    assert note_on_other_devices("auto", torch.device("cpu")) is None
    assert device_name(torch.device("cpu")).startswith("cpu ")


def test_float16_on_a_cpu_is_refused_with_what_to_use() -> None:
    with pytest.raises(ConfigError, match="use --dtype float32 or --dtype bfloat16"):
        choose_dtype("float16", torch.float32, "cpu")


@pytest.mark.parametrize("wanted", ["auto", "bfloat16"])
def test_bfloat16_on_mps_becomes_float16_with_a_warning(wanted: str) -> None:
    choice = choose_dtype(wanted, torch.bfloat16, "mps")
    assert choice.dtype is torch.float16
    assert choice.warning == "bfloat16 does not work on MPS: computing in float16"


def test_bfloat16_on_an_old_gpu_is_replaced_only_if_nobody_asked_for_it() -> None:
    assert choose_dtype("auto", torch.bfloat16, "cuda", cuda_has_bfloat16=False).dtype is torch.float16
    with pytest.raises(ConfigError, match="this GPU has no bfloat16"):
        choose_dtype("bfloat16", torch.bfloat16, "cuda", cuda_has_bfloat16=False)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="wanted auto, cpu, cuda, cuda:N or mps, got 'abacus'"):
        find_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"this machine .* has .*cpu, got 'cuda:0'"):
            find_device("cuda:0")


def test_threads_are_set_as_asked() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        set_threads(before)
