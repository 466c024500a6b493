"""Models whose weights bitsandbytes packs while masks are learned."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.widths.memory import INT8, NF4, Storage


class Quantisation(ABC):
    """How the weights of the linear layers in the blocks are packed while masks are learned.

    Gradients pass through packed weights to the gates; the export cuts the original files, and is
    verified and measured in the original precision.
    """

    storage: Storage

    @abstractmethod
    def config(self, compute: torch.dtype) -> BitsAndBytesConfig:
        """The quantisation configuration for transformers.

        Args:
            compute: Type of matrix products.
        """


@dataclass(frozen=True)
class FourBit(Quantisation):
    """4-bit NormalFloat with double quantisation (QLoRA, arXiv 2305.14314): 0.52 bytes a weight."""

    storage = NF4

    def config(self, compute: torch.dtype) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )


@dataclass(frozen=True)
class EightBit(Quantisation):
    """8-bit integers, outliers in 16 bit (LLM.int8(), arXiv 2208.07339): 1 byte a weight.

    Products are computed in float16, whatever the type of the other weights.
    """

    storage = INT8

    def config(self, compute: torch.dtype) -> BitsAndBytesConfig:
        # It warns at every call of every layer that it computes in float16.
        logger = logging.getLogger("bitsandbytes.autograd._functions")
        logger.addFilter(_without_cast_note)
        return BitsAndBytesConfig(load_in_8bit=True)


def _without_cast_note(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in str(record.msg)


def load_quantised(
    base: BaseModel, quantisation: Quantisation, dtype: str, device: torch.device
) -> PreTrainedModel:
    """A causal language model with packed weights, on its device.

    Args:
        base: The model with its original weights.
        quantisation: How the linear layers of the blocks are packed.
        dtype: Type of the other weights and of computation; "auto" is that of the files.
        device: Device of the model; packed weights cannot move.

    Raises:
        ValueError: A library is missing, or the folder cannot be read.
    """
    compute = base.dtype_of(dtype)
    try:
        from bitsandbytes.nn.modules import Int8Params

        model = base.load(
            dtype=compute,
            quantization_config=quantisation.config(compute),
            device_map={"": device},
        )
    except ImportError as error:
        raise ValueError(
            f"`quantisation` {type(quantisation).__name__} needs bitsandbytes and accelerate: "
            f"pip install 'secateur[cluster]'. ({error})"
        ) from error
    for module in model.modules():
        # In evaluation mode on some CPUs, bitsandbytes repacks 4-bit weights in place, in a format
        # without gradients and not for every width.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if isinstance(getattr(module, "weight", None), Int8Params):
            module.register_forward_hook(_forget_input)
    return model


def _forget_input(layer: nn.Module, inputs: Any, output: Tensor) -> None:
    """Free the input of an 8-bit layer, which only a gradient of its weights would need.

    bitsandbytes always keeps it for the backward pass, hidden from activation checkpointing: the
    inputs of all layers of the model would be in memory at once.
    """
    node: Any = output.grad_fn
    if hasattr(node, "tensors"):  # GPU kernels
        node.tensors = (None,) * len(node.tensors)
    elif hasattr(node, "A"):  # CPU kernels
        node.A = None


def load_original(base: BaseModel, device: torch.device, copies: int) -> PreTrainedModel:
    """A model in the type of its files, on the device if it fits there and else on the host.

    Args:
        base: The model.
        device: The preferred device.
        copies: Number of models of its size that must fit, itself included, 1 or more.

    Raises:
        ValueError: The folder cannot be read as a causal language model.
    """
    model = base.load()
    if device.type == "cuda":
        needed = copies * model.get_memory_footprint()
        if needed < torch.cuda.mem_get_info(device)[0]:
            model.to(device)  # type: ignore[arg-type]
    return model


def check_quantised_run(quantisation: Quantisation, strategy: Any) -> None:
    """Refuse a strategy that would shard packed weights.

    Args:
        quantisation: How the weights are packed.
        strategy: The strategy of the trainer.

    Raises:
        ValueError: It shards the frozen model.
    """
    if getattr(strategy, "divides_models", False):
        raise ValueError(
            f"`quantisation` {type(quantisation).__name__} and `trainer.strategy` "
            f"{type(strategy).__name__} with a sharded model cannot be combined: packed weights "
            "cannot be split between ranks. Use ZeRO stage 1 or 2 or DDP, which keep the packed "
            "model on every rank, or leave `quantisation` out and shard the original weights."
        )


def check_optimizer(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Refuse a paged optimiser on devices without paging, where bitsandbytes would silently not
    page.

    Raises:
        ValueError: It is paged and the device is not CUDA.
    """
    if getattr(optimizer, "is_paged", False) and device.type != "cuda":
        name = type(optimizer).__name__
        raise ValueError(
            f"`optimizer` {name} pages its states out of GPU memory, and this run is on "
            f"{device.type}; use {name.removeprefix('Paged')} here."
        )
