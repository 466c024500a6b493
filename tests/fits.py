"""Fits of a tiny base model in this process, with callbacks that prune it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from secateur.modules.causal_lm import CausalLM
from secateur.modules.data.text_data import TextData


def text_of(inputs: Path) -> TextData:
    """The text that `make_inputs` wrote, in windows of 16 tokens, 4 at a time."""
    return TextData(
        str(inputs / "text.json"),
        tokenizer=str(inputs / "base"),
        window_tokens=16,
        batch_size=4,
        validation_windows=6,
        cache_dir=str(inputs / "cache"),
    )


def fit(
    inputs: Path,
    root: Path,
    callbacks: Sequence[Callback],
    max_steps: int,
    ckpt_path: Path | None = None,
    fast_dev_run: bool = False,
    **settings: Any,
) -> tuple[CausalLM, Trainer]:
    """Train the base model of `make_inputs` further.

    Args:
        inputs: The folder that `make_inputs` filled.
        root: Where outputs go.
        callbacks: What prunes.
        max_steps: Optimiser steps.
        ckpt_path: A checkpoint to go on from.
        fast_dev_run: Whether the run only tries one step.
        **settings: Of `CausalLM`.
    """
    module = CausalLM(base=str(inputs / "base"), warmup_steps=0, **settings)
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=CSVLogger(root, name="metrics"),
        callbacks=[*callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        log_every_n_steps=1,
        gradient_clip_val=0.1,
        fast_dev_run=fast_dev_run,
    )
    trainer.fit(module, text_of(inputs), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer
