"""Change a checkpoint without loading the model: tensors are streamed, and proven to the bit.

`prune_checkpoint` cuts them by a plan. A plan that only narrows all MLPs to one width or removes
whole blocks leaves a stock model of the family; others leave a narrow one and the code that loads
it. The base model may be narrow itself: cutting its index buffers like weights composes both plans.

`prune_blocks` leaves out those of removed blocks and renumbers the others.

`write_pruned_checkpoint` writes new weights in their place: safetensors with zeros, of unchanged
size, and packed masks, one bit per weight. The compressed formats `sparse-bitmask` and
`sparse-24-bitmask` of the package compressed-tensors are not written: transformers 5.23 requires
version 0.15 or newer, which no longer decompresses them (in 0.20 the matrices are random).

Equal inputs give equal folders, byte for byte. Memory: one tensor; the input is memory-mapped.

As commands: `python -m secateur surgery --help`, `python -m secateur depth --help`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import get_console

from secateur.pruning.chains import Step
from secateur.pruning.commands import CommandParser
from secateur.pruning.depth.remaining import lacking_parts
from secateur.pruning.depth.removal import PROVENANCE, checked_blocks, shortened_fields
from secateur.pruning.export.deliver import deliver
from secateur.pruning.export.ranks import OneRank
from secateur.pruning.export.sources import Cut, NewWeights, Source, WithoutBlocks
from secateur.pruning.export.stages import Origin
from secateur.pruning.families import PARTS
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.model_folder import SHARD_BYTES, refuse_base
from secateur.pruning.plan import Plan, plan_without
from secateur.pruning.weights.masks import WeightMasks
from secateur.pruning.weights.store import BlockStore


def prune_checkpoint(
    base_folder: str | Path,
    plan: Plan,
    folder: str | Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the smaller model that a plan leaves of a checkpoint, and prove it from its files.

    Args:
        base_folder: Model folder with config.json and safetensors, in one file or several.
        plan: The kept indices; made for exactly this base model.
        folder: Folder of the smaller model.
        max_shard_bytes: Largest weight file in bytes, 1 or more; a larger tensor gets a file of its
            own.

    Raises:
        ValueError: As for `deliver`; or the base model is damaged or quantised.
        OSError: As for `deliver`.
    """
    what, masks = Cut(plan, max_shard_bytes=max_shard_bytes), {"masks": dict(plan.provenance)}
    _deliver(what, BaseModel(Path(base_folder)), plan.base, folder, masks)


def prune_blocks(
    base_folder: str | Path,
    folder: str | Path,
    *,
    remove: Iterable[int] | None = None,
    keep: Iterable[int] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint without some of its blocks, and prove it from its files.

    Args:
        base_folder: Model folder with config.json and safetensors, in one file or several.
        folder: Folder of the smaller model.
        remove: Indices of the blocks to remove, in any order; or give `keep`.
        keep: Indices of the blocks to keep, in any order; or give `remove`.
        provenance: Facts to record with the blocks, such as score and data; JSON values.

    Raises:
        ValueError: As for `deliver`; or blocks are out of range or repeated, none would remain,
            both or neither of the lists are given, the base model is damaged, quantised or of an
            unknown family, or its configuration has a rule that depends on the index of a block.
        OSError: As for `deliver`.
    """
    base = BaseModel(Path(base_folder))
    refuse_base(folder, base.name)
    base.refuse(Step.BLOCKS)
    num_blocks = base.config.num_hidden_layers
    staying = _staying(num_blocks, remove, keep)
    facts = dict(provenance or {})
    fields = shortened_fields(base.config, staying, {"base": base.fingerprint} | facts)
    skeleton, blocks = base.skeleton(), set(range(num_blocks)) - set(staying)
    gone = {(block, part) for block in blocks for part in PARTS} - lacking_parts(skeleton)
    plan = plan_without(skeleton, base.fingerprint, gone, {"method": "depth"} | facts)
    depth = {"depth": {"kept_blocks": staying} | facts}
    _deliver(WithoutBlocks(plan, fields[PROVENANCE]), base, base.fingerprint, folder, depth)


def write_pruned_checkpoint(
    base_folder: str | Path,
    store: BlockStore,
    masks: WeightMasks,
    folder: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a checkpoint in which the finished blocks of a run replace the original ones.

    Files, shards and types are those of the checkpoint. The result is proven from its files.

    Args:
        base_folder: Model folder that was pruned.
        store: The finished blocks, all of them.
        masks: The masks; written to the subfolder `masks`.
        folder: Folder of the sparse model.
        progress: Called with the numbers of files written and of all files.

    Raises:
        ValueError: As for `deliver`; or the blocks or masks are of another model, or a block is not
            finished.
        OSError: As for `deliver`.
    """
    base = BaseModel(Path(base_folder))
    if store.settings.get("model") != base.fingerprint:
        raise ValueError(
            f"`store` {store.folder} holds no blocks of {base.folder}: another model was pruned, "
            "or this one in memory, or it has changed since. Give the folder that StreamedBlocks "
            "read; write a model in memory by its `save_pretrained`."
        )
    if missing := [name for name in masks if name not in base.tensors]:
        raise ValueError(
            f"`masks` name {len(missing)} tensors that {base.folder} lacks, {missing[0]!r} first; "
            "give those that `prune_weights` returned."
        )
    weights = {"weights": {"settings": store.settings}}
    _deliver(NewWeights(store, masks, progress), base, base.fingerprint, folder, weights)


def _deliver(
    what: Source, base: BaseModel, fingerprint: str, folder: str | Path, provenance: dict[str, Any]
) -> None:
    """Deliver what is proven from the files alone; no model is loaded, and nothing measured."""
    origin = Origin(str(base.name), base.folder, fingerprint, provenance=provenance)
    one, no_windows_NT = OneRank(base.folder, torch.device("cpu")), torch.empty(0, 1).long()
    deliver(what, origin, Path(folder), no_windows_NT, one, measured=False)


def _staying(
    num_blocks: int, remove: Iterable[int] | None, keep: Iterable[int] | None
) -> list[int]:
    """Indices of the kept blocks, in order.

    Raises:
        ValueError: Not exactly one list is given, or blocks do not exist or are repeated.
    """
    if (remove is None) == (keep is None):
        raise ValueError("Give either `remove` or `keep`, the blocks to remove or those to keep.")
    if keep is not None:
        staying = sorted(checked_blocks(keep, num_blocks))
    else:
        gone = checked_blocks(remove or [], num_blocks)
        staying = [block for block in range(num_blocks) if block not in gone]
    if len(staying) == num_blocks:
        raise ValueError(f"All {num_blocks} blocks would be kept; name one to remove.")
    return staying


_HELP = """\
Cut a checkpoint by a plan, without loading the model.

BASE is streamed: memory is that of one tensor, whatever the size of the model. OUT gets
weights in the type of BASE, config.json, tokenizer, the plan, and the code that loads it if the
widths differ between blocks (load with `trust_remote_code=True`); a uniform plan leaves a stock
model. BASE may be a narrow model itself, and OUT is narrow then.

OUT appears when it is complete and equal, bit by bit, to what the plan makes of BASE. The plan must
have been made for exactly BASE, which is checked by a hash of its files. That OUT computes the same
as the masked model is verified at the end of a training run; this command runs no model.

example:
  python -m secateur surgery path/to/Llama-2-7b-hf runs/disp/plan path/to/smaller
"""


def _bytes(text: str) -> int:
    try:
        return int(float(text))
    except (OverflowError, ValueError):
        message = f"must be a number of bytes such as 2e9, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `python -m secateur surgery BASE PLAN OUT`."""
    parser = CommandParser("surgery", _HELP)
    add = parser.add_argument
    add("base", metavar="BASE", type=Path, help="folder of the base model: config, safetensors")
    add("plan", metavar="PLAN", type=Path, help="folder of the plan: plan.json, plan.safetensors")
    add("out", metavar="OUT", type=Path, help="new folder, or a pruned model to replace")
    add(
        "--max-shard-bytes",
        type=_bytes,
        default=SHARD_BYTES,
        metavar="BYTES",
        help="largest file of weights, such as 2e9 (default: 5e9)",
    )
    args = parser.parse_args(arguments)
    with parser.naming(folder="OUT"):
        prune_checkpoint(
            args.base, Plan.load(args.plan), args.out, max_shard_bytes=args.max_shard_bytes
        )
    get_console().print(f"The smaller model is in {args.out}.", soft_wrap=True, markup=False)
