"""Memory of mask learning, predicted from a configuration alone, without weights or device.

Memory that lasts for the whole run is counted on the model's skeleton; memory of a step is measured
by tracking its storages (`live_bytes`). Attention is assumed causal and fused if the model allows
it, as in training.

Sources: sizes of packed weights, QLoRA (arXiv 2305.14314, section 3) and LLM.int8() (arXiv
2208.07339).

Not counted: fragmentation of the allocator, and the libraries themselves. docs/memory.md has the
table, and the error of predictions against measurements.

    python -m secateur memory 7B 70B path/to/model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from secateur.pruning.blocks.refit_memory import refit_bytes
from secateur.pruning.commands import CommandParser
from secateur.pruning.families import blocks_of, family_of, skeleton
from secateur.pruning.files.base_model import read_config
from secateur.pruning.sites import find_sites, gain_sizes
from secateur.pruning.widths.hypernetwork import GRUHypernetwork, SharedHeads
from secateur.pruning.widths.live_bytes import loss_peak, model_step

GB = 1e9
# Vectors over all gates in float32 that a step has at once: logits, noise, samples, gradients.
_GATE_VECTORS = 12
_REFIT_WINDOWS = 256  # by default, after masks
LIVE_PARAMETERS = 200_000_000
"""Parameters that ZeRO-3 prefetches: two of the largest matrices of a 13B model."""


@dataclass(frozen=True)
class Storage:
    """How linear layers in the blocks are stored; other weights keep their type.

    Args:
        label: Its name.
        weight_bytes: Bytes of a weight, its share of the scales included; None keeps the type.
        row_bytes: Further bytes per output feature.
    """

    label: str
    weight_bytes: float | None = None
    row_bytes: int = 0


ORIGINAL = Storage("original")
# Half a byte; one 8-bit scale per 64 weights, and one float32 per 256 scales.
NF4 = Storage("4-bit", 0.5 + 1 / 64 + 4 / (64 * 256))
INT8 = Storage("8-bit", 1.0, row_bytes=4)


@dataclass(frozen=True)
class Run:
    """The settings of a run that affect its memory, per rank.

    Args:
        dtype: Type of the weights that are not packed, and of activations.
        storage: How the linear layers of the blocks are stored.
        batch_size: Windows of a rank, 1 or more.
        window_tokens: Tokens of a window, 2 or more.
        checkpointing: Recompute activations in the backward pass.
        forward_only: There is no backward pass (`PolicyGradient`), so no activations are kept.
        loss_chunk_tokens: Tokens whose logits are in memory at once, 1 or more.
        distillation: Whether the loss compares with the model with open gates.
        hypernetwork: Makes the hypernetwork; called with the sizes of the sites.
        optimizer_bytes: Bytes of optimiser state per trained parameter: 8 for AdamW, 2.03 in 8 bit.
        shards: Ranks that the frozen weights are sharded over (ZeRO-3), 1 or more; 1 does not
            shard.
        live_parameters: Parameters gathered beyond the layer that computes, 0 or more; None gathers
            one block at a time (FSDP2). Used if weights are sharded or offloaded.
        offloaded: Keep the frozen weights in host memory and gather them on the device in turns
            (ZeRO-3).

    Raises:
        ValueError: A number is out of its range, or packed weights are to be sharded.
    """

    dtype: torch.dtype = torch.bfloat16
    storage: Storage = ORIGINAL
    batch_size: int = 1
    window_tokens: int = 2048
    checkpointing: bool = True
    forward_only: bool = False
    loss_chunk_tokens: int = 512
    distillation: bool = True
    hypernetwork: Callable[[Sequence[int]], nn.Module] = SharedHeads
    optimizer_bytes: float = 8.0
    shards: int = 1
    live_parameters: int | None = LIVE_PARAMETERS
    offloaded: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("window_tokens", 2),
            ("loss_chunk_tokens", 1),
            ("shards", 1),
            ("live_parameters", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be {least} or more, got {value}.")
        if self.storage.weight_bytes is not None and (self.shards > 1 or self.offloaded):
            raise ValueError(
                f"`storage` {self.storage.label} cannot be sharded or offloaded: packed weights "
                "cannot be split between ranks; use the original storage."
            )

    @property
    def tokens(self) -> int:
        """Tokens of a step and rank."""
        return self.batch_size * self.window_tokens


@dataclass(frozen=True)
class Footprint:
    """Memory of one rank's device, in bytes.

    Args:
        weights: The frozen model, or this rank's shard of it.
        gathered: Weights that are unpacked or gathered for the layer that computes.
        trained: Hypernetwork and gains: values, gradients, optimiser state.
        gates: Vectors over all gates in a step.
        activations: Tensors that a forward pass keeps for the backward pass.
        working: Additional memory of the loss or the backward pass at its peak.
        host: Weights in host memory; not part of `total`.
    """

    weights: int
    gathered: int
    trained: int
    gates: int
    activations: int
    working: int
    host: int = 0

    @property
    def lasting(self) -> int:
        """Memory before the first step."""
        return self.weights + self.trained

    @property
    def total(self) -> int:
        """The peak."""
        parts = (self.lasting, self.gathered, self.gates, self.activations, self.working)
        return sum(parts)


def footprint(config: PreTrainedConfig, run: Run) -> Footprint:
    """Predict the memory of a run.

    Args:
        config: Configuration of a causal language model of a known family.
        run: Settings of the run.

    Raises:
        ValueError: The family is unknown, or the model cannot be pruned.
    """
    model = skeleton(config)
    family = family_of(config)
    size = run.dtype.itemsize
    packed = [
        module
        for block in blocks_of(model, family)
        for module in block.modules()
        if isinstance(module, nn.Linear) and run.storage.weight_bytes is not None
    ]
    whole = sum(parameter.numel() for parameter in model.parameters()) * size
    weights = whole - sum(linear.weight.numel() for linear in packed) * size
    for linear in packed:
        weights += round(linear.weight.numel() * (run.storage.weight_bytes or 0))
        weights += linear.out_features * run.storage.row_bytes
    gathered = max((linear.weight.numel() for linear in packed), default=0) * size
    if run.shards > 1 or run.offloaded:
        largest = max(parameter.numel() for parameter in model.parameters())
        if run.live_parameters is None:
            block = max(
                sum(parameter.numel() for parameter in block.parameters())
                for block in blocks_of(model, family)
            )
            gathered = max(largest, block) * size
        else:
            gathered = min(weights, (largest + run.live_parameters) * size)
        weights = -(-weights // run.shards)

    sizes = [site.size for site in find_sites(model, family)]
    with torch.device("meta"):
        hypernetwork = run.hypernetwork(sizes)
    trained = sum(parameter.numel() for parameter in hypernetwork.parameters())
    trained += sum(gain_sizes(model, family).values())

    kept, peak = model_step(
        config,
        run.dtype,
        run.batch_size,
        run.window_tokens,
        run.checkpointing,
        run.forward_only,
    )
    # Flattened hidden states, their gradient in chunks and in full, and those of the teacher.
    head: Any = model.get_output_embeddings()
    hidden = run.tokens * head.in_features * size
    loss = (3 + run.distillation) * hidden + loss_peak(
        min(run.loss_chunk_tokens, run.tokens),
        head.in_features,
        head.out_features,
        run.dtype,
        run.distillation,
    )
    return Footprint(
        weights=0 if run.offloaded else weights,
        gathered=gathered,
        trained=round(trained * (8 + run.optimizer_bytes)),
        gates=_GATE_VECTORS * 4 * sum(sizes),
        activations=kept,
        working=max(peak - kept, loss),
        host=weights if run.offloaded else 0,
    )


def settings(run: Run) -> Mapping[str, Run]:
    """Variants of the same run with other storage, the simplest first."""
    whole = replace(run, storage=ORIGINAL, shards=1, offloaded=False)
    return {
        "original weights": replace(whole, checkpointing=False),
        "gradient checkpointing": replace(whole, checkpointing=True),
        "8-bit, checkpointing": replace(whole, storage=INT8, checkpointing=True),
        "4-bit, checkpointing": replace(whole, storage=NF4, checkpointing=True),
        **{
            f"ZeRO-3 on {ranks} GPUs, checkpointing": replace(
                whole, shards=ranks, checkpointing=True
            )
            for ranks in (2, 4, 8)
        },
        "ZeRO-3, weights on the host, checkpointing": replace(
            whole, offloaded=True, checkpointing=True
        ),
    }


def check_fits(config: PreTrainedConfig, run: Run, available: int, device: str) -> str | None:
    """Compare the predicted memory of a run with the available memory.

    Args:
        config: Configuration of the model.
        run: Its settings.
        available: Memory of the device, bytes.
        device: Name of the device.

    Returns:
        A warning if the step is predicted not to fit; else None.

    Raises:
        ValueError: Weights and trained state alone do not fit.
    """
    if _at_most(config, run) <= available:
        return None
    need = footprint(config, run)
    if need.total <= available:
        return None
    fitting = [
        f"{label} ({other.total / GB:.1f} GB)"
        for label, other in (
            (label, footprint(config, other)) for label, other in settings(run).items()
        )
        if other.total <= available
    ]
    cure = (
        f"What would fit: {'; '.join(fitting)}."
        if fitting
        else (
            "No setting of one such device or of 8 would fit; shorten `data.window_tokens`, lower "
            "`data.batch_size` or use larger devices."
        )
    )
    message = (
        f"This run needs about {need.total / GB:.1f} GB per rank and {device} has "
        f"{available / GB:.1f} GB: weights {need.weights / GB:.1f}, hypernetwork, gains and "
        f"optimiser {need.trained / GB:.1f}, activations {need.activations / GB:.1f}, other "
        f"{(need.gathered + need.gates + need.working) / GB:.1f}. {cure} See docs/memory.md."
    )
    if need.lasting > available:
        raise ValueError(message)
    return message


def _at_most(config: PreTrainedConfig, run: Run) -> int:
    """An upper bound without tracking: all inputs and outputs of linear layers and attention
    matrices count eight times in float32, and packed or sharded weights count in full.
    """
    model = skeleton(config)
    sites = find_sites(model, family_of(config))
    with torch.device("meta"):
        trained = sum(p.numel() for p in run.hypernetwork([s.size for s in sites]).parameters())
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    features = sum(linear.in_features + linear.out_features for linear in linears)
    scores = int(config.num_hidden_layers * config.num_attention_heads) * run.window_tokens
    per_gate = 8 + run.optimizer_bytes + _GATE_VECTORS * 4
    return round(
        2 * model.num_parameters() * 4
        + trained * (8 + run.optimizer_bytes)
        + sum(site.size for site in sites) * per_gate
        + 8 * 4 * run.tokens * (features + scores)
    )


# Shapes of the Llama 2 models: blocks, width, MLP width, query heads, key and value heads.
_SHAPES = {
    "7B": (32, 4096, 11008, 32, 32),
    "13B": (40, 5120, 13824, 40, 40),
    "70B": (80, 8192, 28672, 64, 8),
}


def llama2(size: str) -> PreTrainedConfig:
    """The configuration of a Llama 2 by its size: 7B, 13B or 70B."""
    blocks, width, mlp_width, heads, kv_heads = _SHAPES[size]
    return AutoConfig.for_model(
        "llama",
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )


def memory_table(configs: Mapping[str, PreTrainedConfig], run: Run) -> list[list[str]]:
    """Rows of text: settings down, models across, gigabytes (1e9 bytes) per rank.

    The last row is the refit after the masks, with the dense and the cut model in memory.
    """
    rows = [["GB per GPU", *configs]]
    for label, setting in settings(run).items():
        needs = [footprint(config, setting) for config in configs.values()]
        rows.append([label, *(f"{need.total / GB:.1f}" for need in needs)])
    refits = [
        2 * footprint(config, replace(run, storage=ORIGINAL)).weights
        + refit_bytes(config, _REFIT_WINDOWS, run.window_tokens, run.dtype)
        for config in configs.values()
    ]
    rows.append([f"refit on {_REFIT_WINDOWS} windows", *(f"{own / GB:.1f}" for own in refits)])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = CommandParser(
        "memory", "Predict the memory of learning masks, from configurations alone."
    )
    parser.add_argument(
        "models",
        nargs="*",
        default=list(_SHAPES),
        help=f"{', '.join(_SHAPES)} (Llama 2), a model folder, a config.json or a hub id",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="windows per GPU")
    parser.add_argument("--window-tokens", type=int, default=2048, help="tokens of a window")
    parser.add_argument(
        "--reference-heads",
        action="store_true",
        help="one head per site (GRUHypernetwork) instead of SharedHeads",
    )
    args = parser.parse_args(arguments)
    with parser.naming():
        run = Run(
            batch_size=args.batch_size,
            window_tokens=args.window_tokens,
            hypernetwork=GRUHypernetwork if args.reference_heads else SharedHeads,
        )
        configs = {
            name: llama2(name) if name in _SHAPES else read_config(name) for name in args.models
        }
        (heading, *rows), caption = (
            memory_table(configs, run),
            f"{args.batch_size} x {args.window_tokens}",
        )
    table = Table(caption=f"bf16, {caption} tokens per GPU; GB = 1e9 bytes")
    for number, name in enumerate(heading):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
