"""Keep what is needed to resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks._preemption import Preempted, Signals, after_rank_0, requeue
from callbacks._trial import is_trial
from pruning.checkpoints import FOLDER, newest_first, remove_partial, write_whole


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, straight into the file: Lightning's own way holds
    the file in memory first.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write on this rank; returns when the file outlasts a loss of power."""
        write_whole(Path(path), lambda file: torch.save(checkpoint, file))


class SaveCheckpoint(Checkpoint):
    """Save every few steps, and at the end, into `<trainer.default_root_dir>/checkpoints`.

    A checkpoint holds what trains, the optimiser, the loops and the position in the data; the
    frozen base model is named by its fingerprint. Files are written whole or not at all.

    A run that is asked to stop, by SIGUSR1 or SIGTERM on any of its ranks, ends the step, saves,
    and exits with code 75. If it is a step of a SLURM job, the job is requeued first; see
    docs/slurm.md.

    Args:
        every_n_steps: Optimiser steps between two checkpoints, 1 or more.
        keep: Number of newest checkpoints that stay, 1 or more.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 2) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}.")
        self.every_n_steps, self.keep = every_n_steps, keep
        self.last_model_path = ""
        """The newest checkpoint of this run, under the name that Lightning looks for."""
        self._step = 0
        self._signals = Signals()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints written whole.

        Raises:
            ValueError: They were to be written in another way.
        """
        if stage != "fit":
            return
        io = trainer.strategy.checkpoint_io
        if type(io) not in (TorchCheckpointIO, WholeFiles):
            raise ValueError(
                f"`trainer.plugins` has {type(io).__name__}, which SaveCheckpoint cannot tell to "
                "write files whole; remove it."
            )
        trainer.strategy.checkpoint_io = WholeFiles()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the run starts over where an earlier one could be resumed."""
        self._signals.listen()  # before Lightning does, so that after training it is us again
        self.last_model_path = str(trainer.ckpt_path or "")
        if not self.last_model_path and (found := newest_first(_folder(trainer))):
            rank_zero_warn(
                f"{found[0]} is of an earlier run. This run starts from scratch, and its "
                "checkpoints will take the place of the earlier ones; to go on with the earlier "
                "run, stop now and add `--ckpt_path last`."
            )
        if trainer.is_global_zero:
            remove_partial(_folder(trainer))

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take signals over from Lightning."""
        self._signals.listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take signals over from Lightning, and see that all ranks start at one place.

        Raises:
            ValueError: They do not.
        """
        self._signals.listen()
        self._step = trainer.global_step
        first = trainer.strategy.broadcast(self._step)
        if not trainer.strategy.reduce_boolean_decision(first == self._step, all=True):
            raise ValueError(
                f"Rank {trainer.global_rank} starts at step {self._step}, rank 0 at step {first}: "
                f"they do not see the same checkpoints. `default_root_dir` "
                f"{trainer.default_root_dir} must be on a file system that all nodes share."
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save every `every_n_steps` optimiser steps, and when a signal has arrived."""
        if trainer.global_step == self._step:  # a further batch of the same optimiser step
            return
        self._step = trainer.global_step
        stop = self._asked_to_stop(trainer)
        if stop or self._step % self.every_n_steps == 0:
            self._save(trainer)
        if stop:
            self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what training ended with, from which an export can be repeated."""
        self._save(trainer)
        if self._asked_to_stop(trainer):
            self._leave(trainer)
        self._signals.at_once = True

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say what becomes of a run that was stopped while it exported."""
        if isinstance(exception, Preempted) and self._signals.at_once:
            self._signals.at_once = False  # a further signal must not end the request
            self._say(trainer)
        self._signals.ignore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the signals to whoever comes after."""
        self._signals.ignore()

    def _refuse_diverged(self, trainer: Trainer) -> None:
        """A checkpoint is one to go on from: what is no number is not saved.

        Raises:
            FloatingPointError: A step has made trained parameters infinite or NaN; names the step
                and the last good checkpoint.
        """
        trained = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
        shares = (getattr(p, "ds_tensor", p) for p in trained)  # of DeepSpeed, if it has them
        finite = all(bool(share.isfinite().all()) for share in shares)
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise FloatingPointError(
                f"Step {trainer.global_step} left parameters that are infinite or NaN, which are "
                f"not saved; last good checkpoint: {self.last_model_path or 'none was saved'}. "
                "Start again with a lower learning rate (`--model.optimizer.lr`, and "
                "`--model.gain_lr` where masks are learned)."
            )

    def _asked_to_stop(self, trainer: Trainer) -> bool:
        """Whether a signal has arrived on any rank: one that arrives on all does so in between two
        steps of one rank and in the middle of a step of another.
        """
        return trainer.strategy.reduce_boolean_decision(self._signals.arrived, all=False)

    def _leave(self, trainer: Trainer) -> None:
        self._say(trainer)
        raise Preempted

    def _say(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            rank_zero_info(f"Asked to stop; {self.last_model_path} is written. {requeue()}")
        after_rank_0(trainer.global_rank)

    def _save(self, trainer: Trainer) -> None:
        path = _folder(trainer) / f"step={trainer.global_step}.ckpt"
        if is_trial(trainer) or str(path) == self.last_model_path:
            return
        self._refuse_diverged(trainer)
        trainer.save_checkpoint(path, weights_only=False)  # returns when rank 0 has written
        self.last_model_path = str(path)
        if trainer.is_global_zero:
            for old in newest_first(_folder(trainer))[self.keep :]:
                old.unlink(missing_ok=True)


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER
