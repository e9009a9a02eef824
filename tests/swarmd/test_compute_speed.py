"""A span's speed is measured in a moment, by what the server will run."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span
from p2pswarm.testing.arithmetic_model import arithmetic_server_info
from swarmd.compute_speed import measure_compute
from swarmd.throughput import ComputeSpeed, SpanSpeed, ThroughputSource, parse_throughput

INFO = arithmetic_server_info(PeerId("12D3KooWabc"), Span(0, 10), num_model_blocks=30)


class TickingClock:
    """Every look takes the same time."""

    def __init__(self, tick_s: float) -> None:
        self.tick_s = tick_s
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


@pytest.mark.parametrize("tick_s", [1e-4, 10.0])
def test_steps_are_timed_one_by_one_however_long_they_take(tiny_span: SpanModel, tick_s: float) -> None:
    speed = measure_compute(tiny_span, TickingClock(tick_s), TickingClock(tick_s)).speed
    assert speed.decode_s == pytest.approx(tick_s)
    assert speed.batched_decode_s == pytest.approx(tick_s)
    assert 0 < speed.prefill_token_s <= tick_s * 1.001


def test_a_processor_shared_with_others_is_noticed(tiny_span: SpanModel) -> None:
    def measure(cpu_share: float) -> bool:
        clock = TickingClock(1e-3)
        return measure_compute(tiny_span, clock, lambda: cpu_share * clock.now_s).was_disturbed

    assert measure(cpu_share=0.5)
    assert not measure(cpu_share=1.0)


def test_a_real_measurement_makes_sense(tiny_span: SpanModel) -> None:
    speed = measure_compute(tiny_span).speed
    assert 0 < speed.prefill_token_s < speed.decode_s < 1
    assert speed.batched_decode_s > 0


def test_what_is_announced_follows_from_compute_and_line() -> None:
    speed = SpanSpeed(ComputeSpeed(0.02, 0.04, 0.004), num_blocks=10, token_bytes=1250)
    info = speed.announced(INFO, line_bits_per_s=1e7)
    assert info.inference_tokens_per_s == pytest.approx(500)
    assert info.forward_tokens_per_s == pytest.approx(2500)
    assert info.network_tokens_per_s == pytest.approx(1000)
    assert info.throughput_tokens_per_s == pytest.approx(2500 / 5.5)
    assert speed.announced(INFO, line_bits_per_s=1e6).throughput_tokens_per_s == pytest.approx(100)
    relayed = replace(INFO, using_relay=True)
    assert speed.announced(relayed, line_bits_per_s=1e6).throughput_tokens_per_s == pytest.approx(20)


def test_a_stated_throughput_is_announced_as_it_is() -> None:
    speed = SpanSpeed(ComputeSpeed(0.02, 0.04, 0.004), 10, 1250, stated_tokens_per_s=77.5)
    assert speed.announced(INFO, line_bits_per_s=1e3).throughput_tokens_per_s == 77.5


@pytest.mark.parametrize("source", ThroughputSource)
def test_the_source_of_figures_is_read_by_its_name(source: ThroughputSource) -> None:
    assert parse_throughput(source.value) is source


@given(st.floats(1e-3, 1e9))
def test_a_number_is_taken_as_it_is(tokens_per_s: float) -> None:
    assert parse_throughput(str(tokens_per_s)) == tokens_per_s


@pytest.mark.parametrize("text", ["", "fast", "0", "-3", "nan", "inf", "dry_run"])
def test_what_is_no_throughput_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="throughput: wanted auto, eval, dry-run or tokens per second, got "):
        parse_throughput(text)
