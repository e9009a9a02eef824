"""Tiny models of several families in swarms of in-memory servers, tuned; and what peft makes of the same tuning on one
machine."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_swarm import NUM_LABELS, SPANS, TinySwarm, open_tiny_swarm

from p2pswarm.blocks.architecture import Head
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.client.portal import Portal
from p2pswarm.core.span import Span
from p2pswarm.models.distributed_causal_lm import distributed
from p2pswarm.models.distributed_shell import Connection
from p2pswarm.models.tuning.options import TuningOptions
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer

TOKENS = torch.tensor([[0, 0, 5, 17, 99, 3], [42, 7, 8, 61, 23, 90], [0, 77, 30, 11, 4, 9]])
"""Rows of several lengths, padded on the left by tokens 0."""
MASK = (TOKENS != 0).long()
PADLESS = TOKENS[1:2]


class Family:
    """One tiny checkpoint, its parts loaded once: they know of no session."""

    def __init__(self, home: Path, model_type: str) -> None:
        torch.set_num_threads(1)
        self.folder = save_tiny_checkpoint(home / f"tiny-{model_type}", model_type, eos_token_id=None)
        save_tiny_tokenizer(self.folder)
        self.checkpoint: Checkpoint = open_checkpoint(str(self.folder))
        self._parts: dict[Span, SpanModel] = {}

    def part(self, span: Span) -> SpanModel:
        if span not in self._parts:
            self._parts[span] = load_span(self.checkpoint, span)
        return self._parts[span]

    def local(self, head: Head = Head.CAUSAL_LM) -> Any:
        """transformers' own model, all of it in this process."""
        import transformers

        classes = {
            Head.CAUSAL_LM: transformers.AutoModelForCausalLM,
            Head.SEQUENCE_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
            Head.NONE: transformers.AutoModel,
        }
        options: dict[str, Any] = {"num_labels": NUM_LABELS} if head is Head.SEQUENCE_CLASSIFICATION else {}
        return classes[head].from_pretrained(self.folder, **options).eval()

    @contextmanager
    def tuned(self, head: Head = Head.CAUSAL_LM, **options: Any) -> Iterator[Any]:
        """The model in a swarm of three servers, as `from_pretrained` would give it."""
        with self.swarm(head, **options) as (model, _):
            yield model

    @contextmanager
    def swarm(self, head: Head = Head.CAUSAL_LM, **options: Any) -> Iterator[tuple[Any, TinySwarm]]:
        """The same, with what is around it."""
        portal = Portal()
        try:
            opened = open_tiny_swarm(self.checkpoint, self.part, SPANS, call=portal.call, head=head)
            world = portal.enter(opened).value
            tuning = TuningOptions(**options) if options else None
            model = distributed(world.model.shell, Connection(portal, None, world.model), tuning, str(self.folder))
            yield model, world
        finally:
            portal.close()


@torch.no_grad()
def as_if_trained(model: Any, seed: int = 3, size: float = 0.3) -> None:
    """Moves all parameters that are trained off their start, far enough that each changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def with_peft(local: Any, folder: Path) -> Any:
    """What a user of peft has: the local model with the saved adapter. Its gradients are those of the adapter."""
    from peft import PeftModel

    with without_pefts_warnings():
        model = PeftModel.from_pretrained(local, str(folder)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("prompt_encoder", "lora_", "modules_to_save")))
    return model


@contextmanager
def without_pefts_warnings() -> Iterator[None]:
    """peft asks transformers for something by its old name, and tells what it does with position ids."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        yield


def families(home: Path) -> Any:
    """`Family` by model type, each made when it is first asked for."""
    return functools.cache(functools.partial(Family, home))
