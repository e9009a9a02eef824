"""What a model of transformers can do in addition when only a tuning of it is trained: the rest is frozen, here and at
servers, and what is saved is the tuning.

Works with transformers' `Trainer` as it is: that saves by `save_pretrained` and resumes by `load_state_dict`.
"""

from pathlib import Path
from typing import Any, Self

from torch import nn

from p2pswarm.blocks.architecture import Head
from p2pswarm.blocks.client_model import blocks_of, head_names
from p2pswarm.client.carried import NOTHING, Carried
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.local_adapter import MODEL_ID_KEY, TENSOR_PREFIXES, read_local_adapter
from p2pswarm.core.errors import ConfigError
from p2pswarm.models.tuning.beginning import method_from, new_method
from p2pswarm.models.tuning.method import TuningMethod
from p2pswarm.models.tuning.options import TuningOptions
from p2pswarm.models.tuning.saving import save_adapter

TASK_TYPES = {Head.CAUSAL_LM: "CAUSAL_LM", Head.SEQUENCE_CLASSIFICATION: "SEQ_CLS", Head.NONE: "FEATURE_EXTRACTION"}
"""peft's words."""


class TunedShell(nn.Module):
    """Mixed in front of the model's own class."""

    tuning: TuningMethod | None
    """A submodule; None where nothing is tuned."""
    _distributed: DistributedModel

    def prepare_tuning(self, model: DistributedModel, options: TuningOptions | None, base_model: str) -> None:
        """Begins to train what `options` say, and the heads of a model that is made for that. `base_model`: where peft
        finds the whole model."""
        self._distributed = model
        for head in self._heads():
            head.requires_grad_(True)
        self._tune(None if options is None else self._begun(options, base_model))

    def load_tuning(self, folder: str | Path) -> None:
        """Goes on with what was saved in the folder: parameters take its values, the same ones where they were of the
        same kind and sizes before, so that an optimizer that has them stays right. Blocking.

        Raises `CheckpointError` where it does not fit the model, `ConfigError` for what cannot be trained here.
        """
        adapter = read_local_adapter(folder, self._distributed.checkpoint, self._distributed.head)
        method = method_from(adapter)
        adapter.fill_heads(self)
        if self.tuning is not None and self.tuning.is_like(method):
            self.tuning.load_state_dict(method.state_dict())
        else:
            self._tune(method)

    def save_pretrained(
        self, save_directory: str | Path, *, is_main_process: bool = True, state_dict: None = None
    ) -> None:
        """Writes what was trained, and nothing else, as peft does; the options are those that `Trainer` gives."""
        if self.tuning is None:
            raise ConfigError(
                "nothing of this model was tuned, and so there is nothing to save: load it with a tuning_mode"
            )
        if not is_main_process:
            return
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        prefix = TENSOR_PREFIXES[self.tuning.kind]
        heads = {f"{prefix}{name}": tensor for name, tensor in trained.items() if not name.startswith("tuning.")}
        tensors = {**self.tuning.saved_tensors(self._blocks_path()), **heads}
        metadata = {MODEL_ID_KEY: str(self._distributed.model_id)}
        save_adapter(Path(save_directory), self.tuning.adapter_config, tensors, trained, metadata)

    def train(self, mode: bool = True) -> Self:
        """Only what is tuned is in training mode: servers drop nothing out, and so the rest here does not either."""
        super().train(False)
        self.training = mode
        for module in self._trained_modules():
            module.train(mode)
        return self

    def _begun(self, options: TuningOptions, base_model: str) -> TuningMethod:
        shell = self._distributed.shell
        about = {
            "base_model_name_or_path": base_model,
            "modules_to_save": head_names(shell) or None,
            "task_type": TASK_TYPES[self._distributed.head],
            "inference_mode": True,
        }
        return new_method(options, self._distributed, about)

    def _tune(self, method: TuningMethod | None) -> None:
        self.tuning = method
        if method is None:
            return
        self._distributed.carried = self._carried
        # Names that Trainer does not miss in what was saved.
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        self._keys_to_ignore_on_save: Any = [name for name in self.state_dict() if name not in trained]

    def _carried(self) -> Carried:
        return NOTHING if self.tuning is None else self.tuning.carried()

    def _trained_modules(self) -> list[nn.Module]:
        return self._heads() if self.tuning is None else [self.tuning, *self._heads()]

    def _heads(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in head_names(self._distributed.shell)]

    def _blocks_path(self) -> str:
        blocks = blocks_of(self._distributed.shell)
        path: str = next(name for name, module in self.named_modules() if module is blocks)
        return path.rpartition(".")[0]
