"""Update optimiser and strategy when the trained parameters change during training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secateur.modules.optimizers import decay_groups


def check_undivided(strategy: Strategy) -> None:
    """Check that every rank holds all weights, so that blocks can be removed.

    Raises:
        ValueError: The strategy shards or copies the weights.
    """
    # Strategies that shard or copy weights, DeepSpeed's among them, are subclasses of DDP's.
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise ValueError(
            f"Blocks cannot be removed under `trainer.strategy` {type(strategy).__name__}, "
            "which shards weights or optimiser states. Prune on one device or ddp with "
            "`--trainer.max_steps 0`, then train the exported model under the strategy, with "
            "`teacher` for distillation from the dense one."
        )


def let_go(strategy: Strategy, module: LightningModule) -> None:
    """Give optimiser and DDP the parameters that the module has now, in groups as before."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for optimizer in strategy.optimizers:
        groups = decay_groups(trained)
        for group, now in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = now["params"]
        for parameter in optimizer.state.keys() - set(trained):
            del optimizer.state[parameter]
    _wrap_again(strategy, module)


def train_instead(
    strategy: Strategy, module: LightningModule, parameters: list[nn.Parameter]
) -> None:
    """Replace the parameters of the optimiser's last group, and wrap the module in DDP again."""
    for optimizer in strategy.optimizers:
        group = optimizer.param_groups[-1]
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
        group["params"] = parameters
    _wrap_again(strategy, module)


def let_rest(optimizer: torch.optim.Optimizer) -> None:
    """Leave groups at learning rate 0 out of a step: zero gradients that a strategy gives them
    would enter their moment averages.
    """
    hidden: list[tuple[Any, Any]] = []

    def hide(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["lr"] == 0 else ():
                hidden.append((parameter, parameter.grad))
                parameter.grad = None

    def give_back(*_: Any) -> None:
        while hidden:
            parameter, gradient = hidden.pop()
            parameter.grad = gradient

    optimizer.register_step_pre_hook(hide)
    optimizer.register_step_post_hook(give_back)


def _wrap_again(strategy: Strategy, module: LightningModule) -> None:
    if isinstance(strategy.model, DistributedDataParallel):  # waits for all gradients
        assert isinstance(strategy, DDPStrategy)
        strategy.model = module
        strategy.configure_ddp()
