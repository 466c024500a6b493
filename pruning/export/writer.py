"""Export a pruned model: surgery, proof, model card, and one rename that makes it appear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from secateur.pruning.export.model_card import ModelCard
from secateur.pruning.export.rewrite import write_pruned
from secateur.pruning.export.verify import verify_export
from secateur.pruning.files.model_folder import refuse_base, replaced_folder
from secateur.pruning.plan import Plan


def export_model(
    base_folder: str | Path,
    plan: Plan,
    folder: str | Path,
    describe: Callable[[Path], ModelCard],
    model: PreTrainedModel | None = None,
    windows_BT: Int[Tensor, "B T"] | None = None,
) -> float:
    """Write the smaller model, prove that it is what the masked model is, and describe it.

    The folder appears at the end, complete and verified; on any failure nothing of it remains, and
    an earlier pruned model in its place stays.

    Args:
        base_folder: Folder of the base model, see `prune_checkpoint`.
        plan: What stays.
        folder: Where the smaller model goes.
        describe: Makes the model card; called with the verified folder, so that it can measure.
        model: The live dense base model to compare with; None loads it from `base_folder`.
        windows_BT: Token ids to compare on; None draws 2 windows of up to 64 random tokens.

    Returns:
        The largest absolute difference of two logits between masked and exported model.

    Raises:
        ValueError: The plan does not fit, `folder` holds something else, or (`ExportError`) the
            exported model is not the masked one.
        OSError: Reading or writing failed, as when the disk is full.
    """
    refuse_base(folder, base_folder)
    with replaced_folder(folder) as partial:
        write_pruned(base_folder, plan, partial)
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(base_folder, dtype="auto")
            assert isinstance(model, PreTrainedModel)
        if windows_BT is None:
            windows_BT = _random_windows(AutoConfig.from_pretrained(base_folder))
        difference = verify_export(model, plan, partial, windows_BT)
        (partial / "README.md").write_text(describe(partial).render(plan), encoding="utf-8")
    return difference


def _random_windows(config: PreTrainedConfig) -> Int[Tensor, "B T"]:
    length = min(64, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (2, length), generator=generator)
