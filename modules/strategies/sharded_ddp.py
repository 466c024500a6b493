"""DDP for trained parameters, FSDP2 for the frozen model: large frozen models without DeepSpeed.

Source: "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (arXiv 2304.11277), in
its second form, `torch.distributed.fsdp.fully_shard`. Each block of the frozen model is gathered
for its computation and freed afterwards; the trained parameters, which are few, are replicated by
DDP, so that checkpoints are those of DDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.shares import read_shares


class ShardedDDP(DDPStrategy):
    """DDP with the frozen model sharded by FSDP2; on GPUs and CPU ranks.

    Blocks are gathered one by one, without prefetching: `Zero` overlaps more of the transfers with
    computation. Tied embeddings are replicated on every rank.

    Args:
        timeout_seconds: Time after which a rank gives up on the others in a collective operation,
            above 0.

    Raises:
        ValueError: `timeout_seconds` is not above 0.
    """

    divides_models = True
    live_parameters = None  # one block at a time

    def __init__(self, timeout_seconds: float = 1800.0) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"`timeout_seconds` must be above 0, got {timeout_seconds}.")
        super().__init__(timeout=timedelta(seconds=timeout_seconds))

    def connect(self, model: LightningModule) -> None:
        """Attach a module.

        Raises:
            ValueError: The module trains the model itself.
        """
        if not getattr(model, "frozen_weights", False):
            raise ValueError(
                f"`strategy` ShardedDDP shards a frozen model, and {type(model).__name__} trains "
                "its own; use Zero or DDP."
            )
        super().connect(model)

    def read_model(self, base: BaseModel, dtype: str) -> PreTrainedModel:
        """Read this rank's shard of a model, frozen; see `LanguageModelling`."""
        from accelerate import init_empty_weights  # type: ignore[import-untyped]

        base.judge()
        wanted = base.dtype_of(dtype)
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(base.config, dtype=wanted)
        assert isinstance(model, PreTrainedModel)
        model.requires_grad_(False)
        model.tie_weights()
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for part in _parts(model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        _allocate(model, self.root_device)
        read_shares(model, base, _share)
        return model

    def fetching(self, model: nn.Module) -> nn.Module:
        """The model itself: models read here gather their blocks themselves."""
        return model

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Do nothing: trained parameters are replicated."""
        return nullcontext()

    def setup(self, trainer: Trainer) -> None:
        """Set up DDP, which sends trained parameters from rank 0 to the others; sharded ones are
        left out.
        """
        assert self.model is not None
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, frozen)
        super().setup(trainer)

    def teardown(self) -> None:
        """Leave the model on its device: the export after training uses it."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.model = self.lightning_module
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def _parts(model: PreTrainedModel) -> list[nn.Module]:
    """Modules to gather one at a time: every block; embeddings and head if they are not tied."""
    parts = blocks_of(model, family_of(model.config))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings.weight is not head.weight:
        parts += [embeddings, head]
    return parts


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Allocate this rank's parameters; buffers are allocated already."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                empty = torch.empty_like(parameter, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=False)
            setattr(module, name, made[parameter])


def _share(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """This rank's shard of a parameter, and the index of its first entry."""
    data = parameter.detach()
    if not isinstance(data, DTensor):
        return data.view(-1), 0
    mesh: DeviceMesh = data.device_mesh
    rows = -(-data.shape[0] // mesh.size())
    row = data.shape[1:].numel()
    return data.to_local().view(-1), rows * mesh.get_local_rank() * row
