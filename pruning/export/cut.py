"""Cut a live model by a plan, in memory, with the same result as cutting its checkpoint.

The present weights of the live model are used, even if changed since loading; any plan for its
shapes fits. The result has the classes of an exported model, or is a stock model of the family if
the plan leaves one; it can be trained, pruned again and saved.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from secateur.pruning.depth.removal import shortened_config
from secateur.pruning.export.configuration import own_code, stock_fields
from secateur.pruning.export.slices import Slices
from secateur.pruning.modelling import config_class, narrow_type
from secateur.pruning.plan import Plan


def cut(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Make the narrow model that a plan leaves of a live model; the two share no memory.

    Every tensor keeps its type, device and `requires_grad`; gains are folded in.

    Args:
        model: A causal language model of a known family, not quantised, with its updates merged. It
            is not changed.
        plan: The kept indices. The fingerprint of its base is not compared.

    Raises:
        ValueError: The plan does not fit the model, or the model is quantised or wrapped.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "The model is quantised (`quantization_config`), and packed weights cannot be cut. Cut "
            "the original model, then quantise."
        )
    plan.verify(model.config)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))  # also those not in checkpoints
    slices = Slices(plan)
    sources = {
        own.name: (tensor, own)
        for name, tensor in tensors.items()
        if (own := slices.of(name, tensor.shape)) is not None
    }
    buffers = slices.index_buffers()
    narrow = _skeleton(model, plan)
    for path, module in narrow.named_modules():
        for key, old in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            name = f"{path}.{key}".removeprefix(".")
            if name in buffers and name not in sources:
                setattr(module, key, buffers[name].to(model.device, copy=True))
                continue
            if name not in sources:
                raise ValueError(
                    f"The model has no tensor for {name!r} of the narrow model; merge updates into "
                    "the weights and remove wrappers before cutting it."
                )
            tensor, own = sources[name]
            new = own.of(tensor.detach())
            parameter = isinstance(old, nn.Parameter)
            setattr(module, key, nn.Parameter(new, tensor.requires_grad) if parameter else new)
    narrow.tie_weights()
    narrow.generation_config = copy.deepcopy(model.generation_config)
    narrow.train(model.training)
    return narrow


def narrow_config(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The configuration of the model that a plan leaves of a live one; see `exported_config`."""
    keep = plan.kept_blocks()
    smaller = copy.deepcopy(config)
    if len(keep) < config.num_hidden_layers:
        method = {"method": plan.provenance.get("method", "a plan")}
        smaller = shortened_config(config, keep, method)
    if (fields := stock_fields(config, plan)) is not None:
        for name, value in fields.items():
            setattr(smaller, name, value)
        return smaller
    found = config_class(narrow_type(plan.model_type))
    narrow: PreTrainedConfig = found.from_dict(smaller.to_dict() | own_code(config, plan))
    return narrow


def _skeleton(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The narrow model on the meta device, of our own class or a stock one."""
    make: Any = AutoModelForCausalLM.from_config
    config, attention = narrow_config(model.config, plan), model.config._attn_implementation
    with torch.device("meta"):
        narrow: PreTrainedModel = make(config, attn_implementation=attention)
    return narrow
