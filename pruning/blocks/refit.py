"""Refit the weights of a smaller model in closed form, block by block.

Two residual streams are computed on calibration text: h in the dense model, p in the narrow one.
Every layer of the narrow model is refitted by weighted least squares on its inputs there,

    W' = (Y + m W0) (G + m I)^-1,    G = sum w^2 x x^T,    Y = sum w^2 y x^T,

W0 the weight before, w the inverse of the root mean square of the dense vector that y is taken
from. The damping m pulls towards the weight before, not to 0; a bias is the weight of a constant
input and is not damped. The weights before count as much as `damping` tokens of text per input of
the widest layer: m is the mean diagonal of G times `damping` over the tokens per input. Layers of a
block are refitted in order, each on the outputs of the layers refitted before it:

- layers that read the stream through a norm (q, k, v; gate, up) have the outputs of the dense
  layer, W X, as targets;
- layers that write to the stream (o; down) have the present error of the narrow stream as target, y
  = h - p at the entries that they write, so that they make up for entries that earlier blocks could
  not write and for removed parts. Attention and MLP of a parallel block share this target: the MLP
  is fitted to the error that remains after the attention. If a norm follows (Gemma), its output is
  not a linear function of the weights, and the target is the output of the dense layer.

Under a mask, the solution is projected to the weights that may be other than zero, exactly and row
by row. Norms, embeddings and the head are unchanged. Sums are float32, solutions float64.

Expected on a LLaMA of 7 M parameters at half of the block FLOPs, masks by `Fisher`: mean excess of
three texts 0.36 nats before and 0.16 after, on 256 windows of 256 tokens, in the time of 26 to 47
forward and backward passes of 8 windows. On too little text the refit does harm: below 1.5 to 2.3
tokens per input of the widest layer, at 0.3, 0.5 and 0.7 of the FLOPs; less than 3 tokens per input
is refused. 30 give most of the gain; 256 windows are 190. Expected on SmolLM2-135M with 17 tokens
per input, where the damping matters more: 1.67, 1.60, 1.48 and 1.47 nats with m of 0.001, 0.01, 0.1
and 0.5 of the mean diagonal. Memory: `refit_bytes`.

Legend: N = tokens of a batch, B = windows of a batch, T = tokens of a window, D = width of the
residual stream, K = inputs of a narrow layer, O = its outputs, Y = entries of a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.pruning.blocks.compensation import ModelCompensation
from secateur.pruning.blocks.linears import BlockCall
from secateur.pruning.blocks.replay import attention_given, input_of, output_of, outputs_of
from secateur.pruning.blocks.ridge import (
    Sums,
    damped,
    solve,
    squared_error,
    under_mask,
    with_bias,
    with_one,
)
from secateur.pruning.blocks.source import CalibrationStates, LiveBlocks
from secateur.pruning.families import PARTS, Projection, family_of
from secateur.pruning.modes import evaluation
from secateur.pruning.plan import Plan
from secateur.pruning.progress import tracked

TOKENS_PER_INPUT = 3
"""Fewest tokens of calibration text per input of the widest layer."""


@dataclass(frozen=True)
class LayerRefit:
    """The result of the refit of one layer.

    Args:
        name: Block of the dense model and layer, such as `3.mlp.down_proj`.
        damping: Damping of the solution; higher than the setting if the factorisation failed at
            first.
        error_before: Squared error on the calibration text before, as a fraction of the squared
            output; None for layers whose dense outputs are never computed.
        error_after: The same after.
    """

    name: str
    damping: float
    error_before: float | None = None
    error_after: float | None = None


@dataclass(frozen=True)
class Refit(ModelCompensation):
    """Closed-form refit of a narrow or shortened model.

    Args:
        damping: Pull towards the weights before, which count as much as this many tokens of text
            per input of the widest layer; finite and above 0.
        batch_size: Windows that a block sees at once, 1 or more.

    Raises:
        ValueError: A setting is outside its range.
    """

    damping: float = 2.0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ValueError(
                f"`damping` must be finite and above 0, got {self.damping}; 2 is usual."
            )
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be 1 or more, got {self.batch_size}.")

    def check(self, model: PreTrainedModel, units: Sequence[Any], tokens: int) -> None:
        refuse_short_text(model.get_submodule(family_of(model.config).blocks), tokens)

    def __call__(
        self,
        dense: PreTrainedModel,
        smaller: PreTrainedModel,
        plan: Plan,
        windows_NT: Int[Tensor, "N T"],
    ) -> dict[str, Any]:
        layers = refit(dense, smaller, plan, windows_NT, self)
        return {"refitted_layers": len(layers), "refit_windows": len(windows_NT)}


@torch.no_grad()
def refit(
    dense: PreTrainedModel,
    narrow: PreTrainedModel,
    plan: Plan,
    windows_WT: Int[Tensor, "W T"],
    settings: Refit = Refit(),
) -> list[LayerRefit]:
    """Refit all layers of a narrow model, in place.

    Args:
        dense: The model that the narrow one was cut from; it is not changed.
        narrow: The narrow model, result of `cut`.
        plan: The kept indices of the dense model.
        windows_WT: Token ids of calibration text.
        settings: Damping and batch size.

    Raises:
        ValueError: There is too little text, or a layer reads numbers that are not finite.
    """
    narrow_blocks: Any = narrow.get_submodule(plan.family.blocks)
    tokens = windows_WT.numel()
    refuse_short_text(narrow_blocks, tokens)
    share = settings.damping * _widest(narrow_blocks)[0] / tokens
    places = {block: place for place, block in enumerate(plan.kept_blocks())}
    records = []
    with evaluation(dense), evaluation(narrow):
        states = CalibrationStates(LiveBlocks(dense), windows_WT, settings.batch_size)
        narrow_hidden = list(states.hidden)
        for index, dense_block in enumerate(tracked(states.source.blocks, "Refitting blocks")):
            batches = [
                Batch(call, replace(call, hidden_BTD=hidden_BTD))
                for call, hidden_BTD in zip(states.calls(index), narrow_hidden, strict=True)
            ]
            narrow_block = narrow_blocks[places[index]] if index in places else None
            block = BlockPair(index, dense_block, narrow_block, plan)
            records += refit_block(block, batches, share)
            for number in range(len(batches)):  # each is freed once it has been through the block
                states.hidden[number], narrow_hidden[number] = outputs(block, batches.pop(0))
    return records


def refuse_short_text(blocks: nn.Module, tokens: int) -> None:
    """Refuse text on which the refit would do harm.

    Args:
        blocks: The blocks to refit, live or on the meta device.
        tokens: Tokens of the text.

    Raises:
        ValueError: There are fewer than `TOKENS_PER_INPUT` tokens per input of the widest layer.
    """
    width, name = _widest(blocks)
    if tokens < (least := TOKENS_PER_INPUT * width):
        raise ValueError(
            f"The calibration windows have {tokens} tokens, and the refit of {name}, "
            f"which has {width} inputs, needs at least {least}. Raise `calibration_windows` (of "
            "MaskLearning: `settle.refit_windows`) or `data.window_tokens`."
        )


def _widest(blocks: nn.Module) -> tuple[int, str]:
    """Inputs and name of the layer with most inputs."""
    return max(
        (layer.in_features, name)
        for name, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear)
    )


@dataclass(frozen=True)
class BlockPair:
    """A block in the dense and in the narrow model.

    Args:
        index: Its number in the dense model.
        dense: The dense block.
        narrow: The narrow block; None if it is removed.
        plan: The kept indices of the dense model.
    """

    index: int
    dense: nn.Module
    narrow: nn.Module | None
    plan: Plan

    def kept(self, site: str, count: int) -> Int[Tensor, " W"]:
        """Which of `count` features of a site of this block are kept."""
        return self.plan.features(self.index, site, count)


@dataclass
class Batch:
    """A batch of windows at a block of both models; results are stored once computed.

    Args:
        dense: Arguments of the block of the dense model.
        narrow: The same with the stream of the narrow model.
        dense_attention: Output of the dense attention.
        narrow_attention: Output of the narrow attention.
        dense_output: The dense stream after the block.
    """

    dense: BlockCall
    narrow: BlockCall
    dense_attention: Tensor | None = None
    narrow_attention: Tensor | None = None
    dense_output: Tensor | None = None


@torch.no_grad()
def outputs(block: BlockPair, batch: Batch) -> tuple[Tensor, Tensor]:
    """The dense and the narrow stream after a block in its present state."""
    dense_BTD, narrow_BTD = batch.dense_output, batch.narrow.hidden_BTD
    if dense_BTD is None:
        with attention_given(block.dense, batch.dense_attention):
            dense_BTD = batch.dense.run(block.dense)
    if block.narrow is not None:
        with attention_given(block.narrow, batch.narrow_attention):
            narrow_BTD = batch.narrow.run(block.narrow)
    return dense_BTD, narrow_BTD


@torch.no_grad()
def refit_block(
    block: BlockPair,
    batches: Sequence[Batch],
    damping: float,
    masks: Mapping[str, Bool[Tensor, "O K"]] | None = None,
) -> list[LayerRefit]:
    """Refit the layers of one narrow block, in place.

    Args:
        block: The block in both models.
        batches: All windows, at its input.
        damping: Share of the mean diagonal of G, above 0.
        masks: Layer, relative to the block, to True for weights that may be other than zero; other
            layers and all biases stay. None refits all layers, without zeros.

    Raises:
        ValueError: A layer reads numbers that are not finite.
    """
    records = []
    for part in PARTS if block.narrow is not None else ():
        projections = block.plan.family.projections
        readers = [p for p in projections if p.input == f"{part}_in"]
        (writer,) = (p for p in projections if p.output == f"{part}_out")
        if block.plan.keeps(block.index, part):
            solver = _Solver(block, damping, masks)
            records += _refit_readers(solver, readers, batches)
            records.append(_refit_writer(solver, writer, part, batches))
        elif part == "attn" and block.plan.family.has(block.dense, part):
            for batch in batches:
                batch.dense_attention = output_of(block.dense, writer.path, batch.dense)
    return records


@dataclass(frozen=True)
class _Solver:
    """Solves for the layers of a narrow block.

    Args:
        block: The block in both models.
        damping: Share of the mean diagonal of G, above 0.
        masks: Layer, relative to the block, to its mask; None for no zeros.
    """

    block: BlockPair
    damping: float
    masks: Mapping[str, Tensor] | None

    def replace(self, path: str, gram_KK: Tensor, cross_OK: Tensor) -> float:
        """Set the new weight of a layer, if it is refitted; return the damping used."""
        assert self.block.narrow is not None
        if self.masks is not None and path not in self.masks:
            return self.damping
        layer: Any = self.block.narrow.get_submodule(path)
        if not bool(gram_KK.isfinite().all()) or not bool(cross_OK.isfinite().all()):
            raise ValueError(
                f"{self.block.index}.{path} reads numbers that are not finite; load the model in "
                "float32 or bfloat16, or look at the weights before it."
            )
        start_OK = with_bias(layer)
        has_bias = layer.bias is not None and self.masks is None
        if not has_bias:  # the bias stays, or there is none
            cross_OK = cross_OK[:, :-1] - start_OK[:, -1:] * gram_KK[-1, :-1]
            gram_KK, start_OK = gram_KK[:-1, :-1], start_OK[:, :-1]
        solved_OK, used = solve(gram_KK, cross_OK, start_OK, self.damping, has_bias)
        if self.masks is not None:
            mask_OI = self.masks[path].to(solved_OK.device)
            solved_OK = under_mask(solved_OK, mask_OI, damped(gram_KK, used))
        layer.weight.copy_(solved_OK[:, : layer.in_features])
        if has_bias:
            layer.bias.copy_(solved_OK[:, -1])
        return used


def _refit_readers(
    solver: _Solver, readers: Sequence[Projection], batches: Sequence[Batch]
) -> list[LayerRefit]:
    """Refit layers that read the stream, to the outputs of the dense layers."""
    block = solver.block
    assert block.narrow is not None
    sums, path = Sums(), readers[0].path
    for batch in batches:
        x = input_of(block.narrow, path, batch.narrow, batch.narrow_attention)
        dense_x = input_of(block.dense, path, batch.dense, batch.dense_attention)
        sums.update(x, with_one(dense_x.float()), _inverse_rms(dense_x))
    records = []
    for reader in readers:
        weight_OI = with_bias(block.dense.get_submodule(reader.path))
        if reader.output is not None:
            kept_W = block.kept(reader.output, len(weight_OI))
            weight_OI = weight_OI[kept_W.to(weight_OI.device)]
        used = solver.replace(reader.path, sums.gram_KK, weight_OI @ sums.cross_YK)
        records.append(LayerRefit(f"{block.index}.{reader.path}", used))
    return records


def _refit_writer(
    solver: _Solver, writer: Projection, part: str, batches: Sequence[Batch]
) -> LayerRefit:
    """Refit the layer of a part that writes to the stream, to the error of the narrow stream."""
    block = solver.block
    assert block.narrow is not None
    sums, path, inputs = Sums(), writer.path, []
    for batch in batches:
        source_BTO, target_BTW = _target(block, part, path, batch)
        x = input_of(block.narrow, path, batch.narrow, batch.narrow_attention)
        sums.update(x, target_BTW, _inverse_rms(source_BTO))
        if part == "attn":
            inputs.append(x)
    layer = block.narrow.get_submodule(path)
    before = squared_error(layer, sums)
    used = solver.replace(path, sums.gram_KK, sums.cross_YK)
    for batch, x in zip(batches, inputs, strict=False):
        batch.narrow_attention = layer(x)
    return LayerRefit(f"{block.index}.{path}", used, before, squared_error(layer, sums))


def _target(block: BlockPair, part: str, path: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """A dense vector, and the target of the narrow layer that writes for a part (float32)."""
    if part == "attn":
        added_BTO = batch.dense_attention = output_of(block.dense, path, batch.dense)
        stream_BTD = _plus(batch.dense.hidden_BTD, block.dense, part, added_BTO)
    else:
        added_BTO, stream_BTD = outputs_of(block.dense, path, batch.dense, batch.dense_attention)
        batch.dense_output = stream_BTD
    family = block.plan.family
    if family.parts[part] != family.gates[f"{part}_out"]:  # a norm follows
        kept_W = block.kept(f"{part}_out", added_BTO.shape[-1])
        return added_BTO, added_BTO.float()[..., kept_W.to(added_BTO.device)]
    lack_BTD = stream_BTD.float() - batch.narrow.hidden_BTD.float()
    if batch.narrow_attention is not None:
        lack_BTD = _plus(lack_BTD, block.narrow, "attn", -batch.narrow_attention.float())
    index_W = _stream_index(block.narrow, part)
    return stream_BTD, lack_BTD if index_W is None else lack_BTD[..., index_W]


def _plus(stream_BTD: Tensor, block: Any, part: str, added_BTW: Tensor) -> Tensor:
    """The residual stream plus the output of a part of a block."""
    index_W = _stream_index(block, part)
    if index_W is None:
        return stream_BTD + added_BTW
    return stream_BTD.index_add(-1, index_W, added_BTW)


def _stream_index(block: Any, part: str) -> Tensor | None:
    """Entries of the stream that a part of a narrow block writes to; None for all."""
    return getattr(getattr(block, f"{part}_out", None), "index", None)


def _inverse_rms(x: Tensor) -> Tensor:
    return x.float().square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
