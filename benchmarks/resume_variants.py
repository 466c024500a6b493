"""Runs that differ in the contents of their checkpoints: masks, weights and cuts of all kinds.

A variant has the arguments of a command line, for a folder that has `base`, `narrow`, `gemma2`,
`opt`, `phi` and `text.json`; its output goes to `run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.plan import plan_from_indices
from secateur.pruning.sites import find_sites
from tests.runs import learn_masks, on_text, with_callbacks, write_text
from tests.tiny import tiny_family_folder, tiny_folder, tiny_tokenizer

STEPS = 6


@dataclass(frozen=True)
class Variant:
    """A run.

    Args:
        arguments: Arguments of the command line.
        late: Whether it is killed in the last third of its steps, after the masks have settled, and
            not in the first two.
    """

    arguments: tuple[str, ...]
    late: bool = False


def _masks(*settings: str, base: str = "base", late: bool = False) -> Variant:
    callbacks = ("AnnealSparsity", "SaveCheckpoint", "ExportModel")
    run = learn_masks(Path(), Path("run"), STEPS, callbacks, every_n_steps=1)
    return Variant((*run, *settings, *_common(base)), late)


def _open(*settings: str, base: str = "base", late: bool = False) -> Variant:
    """Mask learning from open gates, without a ranking."""
    begun = _masks(base=base)
    kept = [a for a in begun.arguments if not a.startswith("--model.learning")]
    return Variant((*kept, "--model.learning={start: null}", *settings), late)


def _weights(*settings: str, base: str = "base", late: bool = False) -> Variant:
    callbacks = with_callbacks(["SaveCheckpoint", "ExportModel"], every_n_steps=1)
    return Variant(
        (
            "fit",
            "--model=CausalLM",
            "--model.warmup_steps=2",
            f"--trainer.max_steps={STEPS}",
            *on_text(Path(), Path("run")),
            *settings,
            *callbacks,
            *_common(base),
        ),
        late,
    )


def _common(base: str) -> tuple[str, ...]:
    return (
        *([f"--model.base={base}"] if base else []),
        f"--data.tokenizer={base or 'base'}",
        "--data.cache_dir=../cache",
        "--trainer.logger=false",
        "--trainer.limit_val_batches=0",
        "--ckpt_path=last",
    )


def _callback(name: str, *settings: str) -> tuple[str, ...]:
    return (f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{s}" for s in settings))


_LORA = ("--model.lora.rank=2", "--model.lora.dropout=0.5")
_DISTIL = ("--model.loss.cross_entropy=0", "--model.loss.distillation=1")
_CALIBRATION = ("calibration_windows=8", "held_back_windows=4")
_BLOCKS = ("target=Blocks", "target.count=2", "calibration_windows=8")
_ONE_BY_ONE = ("removals=OneByOne", "removals.every_n_steps=2", "removals.first_step=1")
_EACH_STEP = ("removals=OneByOne", "removals.every_n_steps=1", "removals.first_step=1")
_HALVES = ("search=OneShot", "search.score=BlockMagnitude", "search.units=HalfBlocks")
_GRADUALLY = ("gradually.every_n_steps=2", "gradually.over=0.6")
_HALF = ("pattern=Unstructured", "pattern.sparsity=0.5")
_TWO_OF_FOUR = ("pattern=NM", "pattern.n=2", "pattern.m=4")
_SPARSE_GPT = ("score=ObsSaliency", "compensation=SparseGPTSweep")
_WIDTHS = (
    "budget.keep=0.6",
    "search.start.rounds=2",
    "search.start.batches_per_round=1",
    "search.start.batch_size=4",
    "search.rounds=2",
    "search.batches_per_round=1",
    "calibration_windows=40",
    "held_back_windows=8",
)
_SCRATCH = (
    "--model.architecture={model_type: llama, vocab_size: 320, hidden_size: 24, "
    "intermediate_size: 36, num_hidden_layers: 2, num_attention_heads: 6, "
    "max_position_embeddings: 64, bos_token_id: 1, eos_token_id: 2}"
)

VARIANTS: Mapping[str, Variant] = {
    "masks": _masks(),
    "masks, settled": _masks(late=True),
    "masks, settled low rank": _masks("--model.settle.train=LowRank", late=True),
    "masks, settled all weights": _masks("--model.settle.train=AllWeights", late=True),
    "masks, settled whole": _open("--model.settle.cut=false", late=True),
    "masks, no refit": _masks("--model.settle.refit=null", late=True),
    "masks alone": _masks("--model.settle=null"),
    "masks from open gates": _open(),
    "masks under a penalty": _open("--model.learning.pressure=Penalty"),
    "masks with parts": _masks("--model.budget.parts=true"),
    "masks in multiples": _masks("--model.budget.width_multiple=4"),
    "masks of free logits": _masks("--model.hypernetwork=FreeLogits"),
    "masks, two batches a step": _masks("--trainer.accumulate_grad_batches=2"),
    "masks in bfloat16": _masks("--model.frozen.dtype=bfloat16"),
    "masks of a narrow base": _masks(base="narrow"),
    "masks of a narrow base, settled": _masks(base="narrow", late=True),
    "masks of gemma2": _masks(base="gemma2"),
    "masks of opt, settled": _masks(base="opt", late=True),
    "masks of phi": _masks(base="phi"),
    "masks in shares": _open(
        "--model.settle.cut=false", "--trainer.strategy=ShardedDDP", "--trainer.devices=1"
    ),
    "weights": _weights(),
    "weights from nothing": _weights(_SCRATCH, base=""),
    "weights, recomputed": _weights("--model.gradient_checkpointing=true"),
    "weights, distilled": _weights(*_DISTIL),
    "weights of a narrow base, distilled": _weights(
        *_DISTIL, "--model.teacher=base", base="narrow"
    ),
    "low rank": _weights(*_LORA),
    "low rank, distilled": _weights(*_LORA, *_DISTIL, late=True),
    "low rank of a narrow base": _weights(*_LORA, base="narrow"),
    "blocks at once": _weights(*_callback("PruneBlocks", *_BLOCKS)),
    "blocks one by one": _weights(*_callback("PruneBlocks", *_BLOCKS, *_ONE_BY_ONE)),
    "blocks one by one, refitted": _weights(
        *_callback(
            "PruneBlocks",
            *_BLOCKS,
            *_ONE_BY_ONE,
            "compensation=Refit",
            "calibration_windows=40",
            "held_back_windows=8",
        )
    ),
    "blocks one by one, low rank": _weights(
        *_LORA, *_callback("PruneBlocks", *_BLOCKS, *_ONE_BY_ONE), late=True
    ),
    "halves one by one": _weights(*_callback("PruneBlocks", *_BLOCKS, *_HALVES, *_EACH_STEP)),
    "zeros in a pattern": _weights(
        *_callback("PruneWeights", *_TWO_OF_FOUR, *_SPARSE_GPT, *_CALIBRATION)
    ),
    "zeros gradually": _weights(*_callback("PruneWeights", *_HALF, *_GRADUALLY, *_CALIBRATION)),
    "zeros gradually, low rank": _weights(
        *_LORA, *_callback("PruneWeights", *_HALF, *_GRADUALLY, *_CALIBRATION), late=True
    ),
    "widths refitted": _weights(*_callback("PruneWidths", *_WIDTHS)),
    "widths gradually": _weights(*_callback("PruneWidths", *_WIDTHS, *_GRADUALLY)),
    "widths gradually, low rank": _weights(
        *_LORA, *_callback("PruneWidths", *_WIDTHS, *_GRADUALLY), late=True
    ),
    "widths of a narrow base": _weights(
        *_callback("PruneWidths", *_WIDTHS, "compensation=null"), base="narrow"
    ),
}
BASES = ("base", "narrow", "gemma2", "opt", "phi")


def make_bases(folder: Path) -> None:
    """Fill a folder with the inputs of the variants."""
    tiny_folder(folder / "base", num_hidden_layers=4, intermediate_size=36)
    for family in BASES[2:]:
        tiny_family_folder(folder / family, family)
        tiny_tokenizer().save_pretrained(folder / family)
    base = BaseModel(folder / "base")
    family_row, model = base.family.with_parts(), base.skeleton()
    # Different widths, and a block without attention.
    kept = [
        torch.arange(
            0 if (site.block, site.part) == (0, "attn") else max(1, site.size - site.block)
        )
        for site in find_sites(model, family_row)
    ]
    plan = plan_from_indices(model, base.fingerprint, kept, {}, family=family_row)
    prune_checkpoint(folder / "base", plan, folder / "narrow")
    write_text(folder / "text.json", documents=16)
