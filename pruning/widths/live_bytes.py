"""Memory of a training step, measured by tracking storages instead of formulas.

A step runs on fake tensors, which have shapes and storages but no content: it needs no memory,
weights or device, and covers all operations of the model. Every storage is tracked from creation to
release.

Legend: B = windows, T = tokens, D = width, C = tokens of a chunk, V = vocabulary.
"""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from secateur.pruning.losses import LossWeights, token_losses
from secateur.pruning.modelling import is_narrow
from secateur.pruning.widths.gate_hooks import GateHooks

# Fused causal attention without a mask, as in training on windows without padding. Fake tensors
# would get a mask, because their content cannot show that none is needed.
_CAUSAL = "secateur_causal"
AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
AttentionMaskInterface.register(_CAUSAL, lambda *args, **kwargs: None)


class LiveBytes(TorchDispatchMode):
    """A mode that tracks the storages of all tensors created while it is active.

    Args:
        known: Tensors that are not counted, such as the weights.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._follow, result)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class _Step:
    """Cache key of a tracked step, which is computed once."""

    config: PreTrainedConfig = field(compare=False)
    text: str
    dtype: torch.dtype
    batch_size: int
    window_tokens: int
    checkpointing: bool
    forward_only: bool


def model_step(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    batch_size: int,
    window_tokens: int,
    checkpointing: bool,
    forward_only: bool = False,
) -> tuple[int, int]:
    """Result of `decoder_step` for the frozen model of a configuration, computed from a few blocks.

    Blocks are alike, so the result is extrapolated linearly from the first two and the first four:
    two at a time, because neighbouring blocks may have different attention masks. Blocks of a
    narrow model differ: all are tracked.

    Args:
        config: Configuration of a causal language model of a known family.
        dtype: Type of weights and activations.
        batch_size: Windows, 1 or more.
        window_tokens: Tokens of a window, 1 or more.
        checkpointing: Recompute activations in the backward pass.
        forward_only: There is no backward pass.
    """
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    step = _Step(config, text, dtype, batch_size, window_tokens, checkpointing, forward_only)
    if is_narrow(config.model_type):
        return _blocks(step, config.num_hidden_layers)
    two, four = _blocks(step, 2), _blocks(step, 4)
    more = config.num_hidden_layers - 2
    kept, peak = (a + more * (b - a) // 2 for a, b in zip(two, four, strict=True))
    return kept, peak


@lru_cache(maxsize=64)
def _blocks(step: _Step, num_blocks: int) -> tuple[int, int]:
    """`decoder_step` of the first blocks of a model."""
    config = copy.deepcopy(step.config)
    config.num_hidden_layers = num_blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_blocks]
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=step.dtype)
        model.requires_grad_(False)
        model.train()
        sizes = step.batch_size, step.window_tokens
        return decoder_step(model, *sizes, step.checkpointing, step.forward_only)


def decoder_step(
    model: Any,
    batch_size: int,
    window_tokens: int,
    checkpointing: bool,
    forward_only: bool = False,
) -> tuple[int, int]:
    """Bytes of live tensors after the forward pass with gates, and the peak of forward and
    backward.

    Args:
        model: A frozen causal language model, real or fake; it is changed.
        batch_size: Windows, 1 or more.
        window_tokens: Tokens of a window, 1 or more.
        checkpointing: Recompute activations in the backward pass.
        forward_only: There is no backward pass.
    """
    hooks = GateHooks(model)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_CAUSAL)
    if checkpointing:
        # Renamed in transformers 5.23, which deprecates the old name.
        old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        getattr(model, new if hasattr(model, new) else old)(
            {
                "use_reentrant": False,
                "context_fn": lambda: (nullcontext(), hooks.applied(hooks.gates)),
            }
        )
    device = next(model.parameters()).device
    gates = [torch.ones(site.size, device=device, requires_grad=True) for site in hooks.sites]
    input_BT = torch.zeros((batch_size, window_tokens), dtype=torch.long, device=device)
    live = LiveBytes([*model.parameters(), *model.buffers()])
    with live:
        with hooks.applied(gates), torch.set_grad_enabled(not forward_only):
            output = model.get_decoder()(input_ids=input_BT, use_cache=False)
            hidden_BTD = output.last_hidden_state
            del output
        kept = live.now
        if not forward_only:
            hidden_BTD.backward(torch.ones_like(hidden_BTD))
    hooks.remove()
    return kept, live.peak


@lru_cache(maxsize=64)
def loss_peak(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, distillation: bool
) -> int:
    """Peak bytes of live tensors while losses of a chunk and their gradients are computed."""
    with FakeTensorMode():
        head_VD = torch.empty(vocabulary, width, dtype=dtype)
        piece_CD = torch.empty(tokens, width, dtype=dtype, requires_grad=True)
        live = LiveBytes([head_VD, piece_CD])
        with live:
            token_losses(
                piece_CD,
                torch.zeros(tokens, dtype=torch.long),
                lambda hidden: F.linear(hidden, head_VD),
                teacher_ND=piece_CD.detach() if distillation else None,
                weights=LossWeights(1.0, float(distillation)),
                chunk_tokens=tokens,
            )
        return live.peak
