"""Low-rank updates of the linear layers of the blocks, by the package peft.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685); the defaults are
those of "Shortened LLaMA" (arXiv 2402.02834, section 4) for recovery after blocks are removed.

Legend: O = output features, I = input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from secateur.pruning.families import blocks_of, family_of

ADAPTER = "recovery"


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates W + (alpha / rank) B A of linear layers; all other weights stay frozen.

    Args:
        rank: Rows of A and columns of B, 1 or more.
        alpha: Scaling of the update, above 0; its factor is `alpha` / `rank`.
        dropout: Fraction of the inputs of A that is dropped in training, in [0, 1).
        targets: Ends of the names of the layers, such as `self_attn.q_proj`; if not given, every
            linear layer of the blocks: q, k, v, o, gate, up and down of a Llama.

    Raises:
        ValueError: A setting is out of its range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"`rank` must be 1 or more, got {self.rank}.")
        if self.alpha <= 0:
            raise ValueError(f"`alpha` must be above 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}.")

    def check(self, config: PretrainedConfig) -> None:
        """Refuse a rank above the size of every layer of a model.

        Args:
            config: Configuration of the model, before its widths are cut.

        Raises:
            ValueError: The rank is higher.
        """
        highest = max(config.hidden_size, getattr(config, family_of(config).mlp_width))
        if self.rank > highest:
            raise ValueError(
                f"`rank` must be {highest} or less, the size of the model's widest layer, got "
                f"{self.rank}; usual ranks are 4 to 64."
            )

    def inject(self, model: PreTrainedModel) -> None:
        """Freeze a model and add updates, which start at zero, to its layers.

        Updates are float32, whatever the type of the model: small steps round to zero in bfloat16.

        Raises:
            ValueError: peft is missing, or a target names no layer of the model.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ValueError(
                "`lora` needs the package peft, which is not installed: pip install '.[lora]' "
                "in the folder of Secateur, or leave `lora` out."
            ) from error
        family = family_of(model.config)
        there = [p for block in blocks_of(model, family) for p in family.projections_of(block)]
        targets = self.targets or list(dict.fromkeys(p.path for p in there))
        names = [name for name, _ in model.named_modules()]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise ValueError(f"`targets` has {target!r}, which matches no layer of the model.")
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
        )
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers of a model with updates, by name, as peft modules."""
    modules = model.named_modules()
    return {name: module for name, module in modules if hasattr(module, "get_delta_weight")}


def added_up(layer: Any) -> Tensor:
    """The weight of a layer with its update, in the type of the weight."""
    weight_OI = layer.get_base_layer().weight.data
    update_OI = layer.get_delta_weight(ADAPTER).detach().float()
    total_OI: Tensor = (weight_OI.float() + update_OI).to(weight_OI.dtype)
    return total_OI


@contextmanager
def merged(model: PreTrainedModel) -> Iterator[None]:
    """The model with its updates merged into its weights; restored exactly afterwards.

    Inside, names and modules are those of a model without updates; without updates, nothing
    changes.
    """
    layers = adapted(model)
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    originals = {name: weight.data for name, weight in weights.items()}
    try:
        for name, layer in layers.items():
            weights[name].data = added_up(layer)
            model.set_submodule(name, layer.get_base_layer())
        yield
    finally:
        for name, layer in layers.items():
            weights[name].data = originals[name]
            model.set_submodule(name, layer)
