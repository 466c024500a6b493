"""Cut a checkpoint by a plan without loading the model: tensors are streamed and sliced.

The result is a model folder: safetensors, configuration, tokenizer, the plan, and, if widths differ
between blocks, the code that loads it. A plan that only narrows all MLPs to one width or removes
whole blocks leaves a stock model of the family. The base model may be narrow itself: cutting its
index buffers like weights composes both plans. Equal inputs give equal folders, byte for byte.

Memory: one shard of the output; the input is memory-mapped. The base model is hashed while it is
cut.

As a command: `python -m secateur surgery --help`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import get_console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.pruning.commands import CommandParser
from secateur.pruning.export.slices import Slice, Slices
from secateur.pruning.families import PARTS, part_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.finish import finish
from secateur.pruning.files.headers import INDEX, WEIGHTS
from secateur.pruning.files.model_folder import (
    CONFIG,
    SHARD_BYTES,
    refuse_base,
    replaced_folder,
    write_json,
)
from secateur.pruning.modelling import config_class, narrow_type
from secateur.pruning.modelling.secateur_narrow import auto_map
from secateur.pruning.plan import IN_MODEL, Plan
from secateur.pruning.progress import Advance, phase


def prune_checkpoint(
    base_folder: str | Path,
    plan: Plan,
    folder: str | Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the smaller model that a plan leaves of a checkpoint.

    The folder appears when everything is written; on any failure it is removed. An earlier pruned
    model in its place is replaced only at that moment.

    Args:
        base_folder: Model folder with config.json and safetensors, in one file or several.
        plan: The kept indices; made for exactly this base model.
        folder: Folder of the smaller model.
        max_shard_bytes: Largest weight file in bytes, 1 or more; a larger tensor gets a file of its
            own.

    Raises:
        ValueError: The plan does not fit the base model, the base model is damaged or quantised,
            or something else exists at `folder`.
        OSError: Reading or writing failed, for example because the disk is full.
    """
    refuse_base(folder, base_folder)
    with replaced_folder(folder) as partial:
        write_pruned(base_folder, plan, partial, max_shard_bytes)


def write_pruned(
    base_folder: str | Path,
    plan: Plan,
    folder: Path,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the smaller model into an empty folder; see `prune_checkpoint`.

    Raises:
        ValueError: As for `prune_checkpoint`.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"`max_shard_bytes` must be 1 or more, got {max_shard_bytes}.")
    base = BaseModel(Path(base_folder))
    with _hashed(base, plan.base):
        plan.verify(base.config)
        cuts = _find_cuts(base, plan)
        with phase("Writing weights", sum(cut.num_bytes for cut in cuts)) as advance:
            _write_weights(cuts, folder, max_shard_bytes, advance)
    write_json(folder / CONFIG, exported_config(base, plan))
    finish(folder, base.folder)
    plan.save(folder / IN_MODEL)


@contextmanager
def _hashed(base: BaseModel, expected: str) -> Iterator[None]:
    """Compute the fingerprint of the base model in parallel to a `with` block.

    Raises:
        ValueError: It is not the expected one; replaces errors of the block that follow from this.
    """
    base.check()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: base.fingerprint)
        try:
            yield
        finally:
            if found.result() != expected:
                raise ValueError(
                    f"The plan was made for the base model with fingerprint {expected[:16]}..., "
                    f"and {base.folder} has {found.result()[:16]}...; give the base model that the "
                    "plan was made for."
                )


def exported_config(base: BaseModel, plan: Plan) -> dict[str, Any]:
    """The configuration of the smaller model: that of the base model and its new widths.

    They are one field if the plan leaves a stock model, else `block_widths`, one entry per
    remaining block; a removed part has width 0.
    """
    config = dict(base.settings)
    by_block, keep = plan.widths_by_block(), plan.kept_blocks()
    if len(keep) < len(by_block):
        from secateur.pruning.depth.removal import shortened_fields  # imports this module

        method = {"method": plan.provenance.get("method", "a plan")}
        config |= shortened_fields(base.config, keep, method)
    if (width := plan.stock_mlp_width()) is not None:
        return config | {plan.family.mlp_width: width}
    return config | own_code(plan)


def own_code(plan: Plan) -> dict[str, Any]:
    """Configuration entries of a model with custom code."""
    model_type, by_block = narrow_type(plan.model_type), plan.widths_by_block()
    classes = config_class(model_type).auto_classes
    return {
        "model_type": model_type,
        "architectures": [classes["AutoModelForCausalLM"].__name__],
        "auto_map": auto_map(classes),
        "block_widths": [_shown(by_block[block]) for block in plan.kept_blocks()],
    }


def _shown(widths: dict[str, int]) -> dict[str, int]:
    """Widths of a block in the form of `block_widths`: a missing part is only a width of 0."""
    inside = {name: width for name, width in widths.items() if width and name not in PARTS}
    there = {part_of(name) for name in inside}
    return {part: 0 for part in PARTS if part not in there} | inside


@dataclass(frozen=True)
class _Cut:
    """A tensor of the smaller model, not read yet.

    Args:
        name: Name of the tensor.
        num_bytes: Its size.
        make: Function that reads and cuts it.
    """

    name: str
    num_bytes: int
    make: Callable[[], Tensor]


def _find_cuts(base: BaseModel, plan: Plan) -> list[_Cut]:
    """All tensors of the smaller model: those of the base model, then the index buffers."""
    slices, cuts = Slices(plan), []
    for name in base.tensors:
        header = base.headers[name]
        try:
            own = slices.of(name, header.shape)
        except ValueError as error:
            raise ValueError(f"In {header.path}, {error}") from error
        if own is not None:
            num_bytes = own.num_entries * _bytes_of(header.dtype)
            cuts.append(_Cut(own.name, num_bytes, partial(_read, header.path, name, own)))
    done = {cut.name for cut in cuts}  # with the buffers of a base model that is narrow
    for name, index_W in slices.index_buffers().items():
        if name not in done:
            cuts.append(_Cut(name, 8 * len(index_W), index_W.clone))
    return cuts


def _read(path: Path, name: str, own: Slice) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return own.of(tensor)


def _write_weights(
    cuts: Sequence[_Cut],
    folder: Path,
    max_shard_bytes: int,
    advance: Advance,
) -> None:
    shards: list[list[_Cut]] = [[]]
    filled = 0
    for cut in cuts:
        if shards[-1] and filled + cut.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(cut)
        filled += cut.num_bytes
    total = sum(cut.num_bytes for cut in cuts)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        with ThreadPoolExecutor() as pool:
            for cut, tensor in zip(shard, pool.map(lambda cut: cut.make(), shard), strict=True):
                tensors[cut.name], weight_map[cut.name] = tensor, name
                advance(cut.num_bytes)
        # One key only: with more, their order in the file is random.
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, content)


def _bytes_of(dtype: str) -> int:
    """Bytes per entry of a safetensors type such as `BF16`, `F32`, `F8_E4M3` or `BOOL`."""
    return 1 if dtype == "BOOL" else int("".join(filter(str.isdigit, dtype.split("_")[0]))) // 8


_HELP = """\
Cut a checkpoint by a plan, without loading the model.

BASE is streamed: memory is that of one output shard, whatever the size of the model. OUT gets
weights in the type of BASE, config.json, tokenizer, the plan, and the code that loads it if the
widths differ between blocks (load with `trust_remote_code=True`); a uniform plan leaves a stock
model. BASE may be a narrow model itself, and OUT is narrow then.

OUT appears when it is complete. The plan must have been made for exactly BASE, which is checked by
a hash of its files. That OUT computes the same as the masked model is verified at the end of a
training run, which loads both; this command runs no model.

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
    prune_checkpoint(
        args.base, Plan.load(args.plan), args.out, max_shard_bytes=args.max_shard_bytes
    )
    get_console().print(f"The smaller model is in {args.out}.", soft_wrap=True, markup=False)
