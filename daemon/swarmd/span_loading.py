"""Makes served spans of the model that was opened: weights, KV cache, service. And unmakes them.

All computing is the device thread's; importing this file imports torch. What is loaded is measured and sized in
`swarmd/engine.py`.
"""

import gc
import logging
import weakref
from collections.abc import Callable
from functools import partial

import psutil
import torch
import trio

from p2pswarm.blocks.heap import trim_heap
from p2pswarm.blocks.page_tables import pages_for
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.wire.messages import InfoReply
from swarmd import engine
from swarmd.config import ServerConfig
from swarmd.device_thread import DeviceThread
from swarmd.engine import LoadedSpan, OpenedModel
from swarmd.engine_statistics import engine_statistics
from swarmd.events import Events
from swarmd.handler import Served, SpanService
from swarmd.line_speed import Line
from swarmd.probe import probe
from swarmd.scheduling.costs import CostModel
from swarmd.scheduling.cpu_sharing import CpuSharing
from swarmd.self_description import online_info
from swarmd.served_span import ServedSpan
from swarmd.throughput import MEASURED_ROWS

FREE_TRIES, FREE_RETRY_S = 20, 0.1
"""What the device's thread was left to do afterwards still holds a session's model for some milliseconds."""

logger = logging.getLogger(__name__)


class ModelLoader:
    """Implements `served_span.SpanLoader` on a device."""

    def __init__(
        self,
        opened: OpenedModel,
        config: ServerConfig,
        device: DeviceThread,
        describe: Callable[[], InfoReply],
        events: Events,
        line: Line,
    ) -> None:
        self._opened = opened
        self._config = config
        self._device = device
        self._describe = describe
        self._events = events
        self._line = line
        self._model: weakref.ref[SpanModel] | None = None

    async def load(self, info: ServerInfo) -> ServedSpan:
        opened = self._opened
        self._events("loading", model=opened.checkpoint.name, blocks=str(info.span), dtype=opened.dtype_name)
        loaded = await self._device.run(partial(engine.load, opened, info.span, self._config))
        speed = loaded.speed
        self._model = weakref.ref(loaded.model)
        pool = loaded.model.new_pool(pages_for(loaded.cache_tokens))
        config = self._config
        served = Served(info.model_id, loaded.model, pool, loaded.max_length, config.training_memory, config.max_tuning)
        service = SpanService(served, self._device, self._describe, _known_costs(loaded), _sharing(opened.device))
        await self._device.run(trim_heap)
        gc.freeze()  # what a load leaves behind stays for long: looking through it costs 0.3 s each time
        gc.enable()
        return ServedSpan(
            service,
            online_info(info, loaded, self._line.bits_per_s),
            room=service.memory,
            waiting=service.dispatcher,
            at_speed=lambda announced: speed.announced(announced, self._line.bits_per_s),
            probe=partial(probe, service, info, loaded.model.hidden_size),
            statistics=partial(engine_statistics, service.dispatcher, service.memory, service.tunings),
        )

    async def free(self) -> None:
        gc.disable()  # a collection that is under way in this thread would make the one below return with nothing done
        try:
            for _ in range(FREE_TRIES):
                await self._device.run(_collect)
                if self._model is None or self._model() is None:
                    await self._device.run(_give_memory_back)
                    return
                await trio.sleep(FREE_RETRY_S)
        finally:
            gc.enable()
        logger.warning("the weights of the blocks served before are still in memory: something refers to them")


def _known_costs(loaded: LoadedSpan) -> CostModel:
    """What the measurement at the start says of batches and prompts."""
    speed = loaded.speed.compute
    row_s = max(0.0, speed.batched_decode_s - speed.decode_s) / (MEASURED_ROWS - 1)
    return CostModel(speed.decode_s, row_s, speed.prefill_token_s)


def _sharing(device: torch.device) -> Callable[[float], bool]:
    """Whether the time for which the device waits is used by others: only where it is made of processors."""
    if device.type != "cpu":
        return lambda now_s: False
    return CpuSharing(psutil.cpu_count() or 1).is_shared


def _collect() -> None:
    """Modules refer to each other in circles, so only the collector frees them; frozen ones it leaves alone."""
    gc.unfreeze()
    gc.collect()


def _give_memory_back() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()
