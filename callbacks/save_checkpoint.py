"""Save checkpoints to resume from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from secateur.callbacks._after_step import AfterStep
from secateur.callbacks._preemption import Preempted, Signals, after_rank_0, requeue
from secateur.callbacks._trial import is_trial
from secateur.pruning.files.checkpoints import (
    FOLDER,
    newest_first,
    next_run,
    read_figures,
    remove_partial,
    seal,
    step_of,
    write_figures,
    write_whole,
)


class WholeFiles(TorchCheckpointIO):
    """Write checkpoints completely or not at all, with a checksum, directly to the file; Lightning
    builds the file in memory first.

    Args:
        run: Number of this launch in the folder, 1 or more; a higher number means newer
            checkpoints.
    """

    def __init__(self, run: int) -> None:
        super().__init__()
        self.run = run

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write on this rank; return when the file is safely on disk."""

        def write(file: BinaryIO) -> None:
            torch.save(checkpoint, file)
            seal(file, self.run, checkpoint["global_step"])

        write_whole(Path(path), write)


class SaveCheckpoint(AfterStep, Checkpoint):
    """Save every few steps, and at the end, into `<trainer.default_root_dir>/checkpoints`.

    A checkpoint holds the trained parameters, the optimiser, the loops and the position in the
    data; the frozen base model is identified by its fingerprint. Files are written completely or
    not at all, with a checksum.

    A run that is asked to stop, by Ctrl-C, SIGHUP, SIGUSR1 or SIGTERM on any of its ranks, finishes
    the step, saves, and exits with code 75; a second Ctrl-C ends it at once. If it is a step of a
    SLURM job, the job is requeued first; see docs/slurm.md.

    Training that early stopping ended is final: resuming from its last checkpoint repeats the
    export and trains no further.

    Besides the newest checkpoints, those with the lowest validation figures can be kept. They are
    listed in `checkpoints/best.json`, and `--ckpt_path best` is the first of them.

    Args:
        every_n_steps: Optimiser steps between two checkpoints, 1 or more.
        keep: Number of newest checkpoints to keep, 1 or more.
        keep_best: Number of best checkpoints to keep regardless of age, 0 or more. Every validation
            counts, also between two checkpoints; of equal figures the first is kept.
        monitor: Name of a figure that validation logs, the same on all ranks; lower is better. If
            sparsity rises or blocks are removed during training, early steps have the lower
            figures.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        keep: int = 2,
        keep_best: int = 0,
        monitor: str = "val_perplexity",
    ) -> None:
        least = {
            "every_n_steps": (every_n_steps, 1),
            "keep": (keep, 1),
            "keep_best": (keep_best, 0),
        }
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise ValueError(f"`{name}` must be {lowest} or more, got {value}.")
        self.every_n_steps, self.keep = every_n_steps, keep
        self.keep_best, self.monitor = keep_best, monitor
        self.last_model_path = ""
        """The newest checkpoint of this run, under the name that Lightning looks for."""
        self._figures: dict[str, float] = {}  # figures of the best checkpoints, lowest first
        self._ended_early = False
        self._signals = Signals()

    def check_first(self, trainer: Trainer, module: LightningModule) -> None:
        """Check, before anything is read, that validation can select checkpoints.

        Raises:
            ValueError: There is no validation, or it would run between the batches of a step.
        """
        if self.keep_best and trainer.limit_val_batches == 0:
            raise ValueError(
                f"`keep_best` is {self.keep_best} and `trainer.limit_val_batches` is 0: without "
                "validation no checkpoint is better than another. Change one of them."
            )
        every, batches = trainer.val_check_interval, trainer.accumulate_grad_batches
        if self.keep_best and isinstance(every, int) and every % batches:
            raise ValueError(
                f"`keep_best` is {self.keep_best}: validation every {every} batches falls between "
                f"the {batches} of a step (`trainer.accumulate_grad_batches`), when no checkpoint "
                f"can be saved; set `trainer.val_check_interval` to a multiple of {batches}."
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the writer of complete checkpoints.

        Raises:
            ValueError: Another plugin writes checkpoints.
        """
        if stage != "fit":
            return
        io = trainer.strategy.checkpoint_io
        if type(io) not in (TorchCheckpointIO, WholeFiles):
            raise ValueError(
                f"`trainer.plugins` has {type(io).__name__}, which cannot write complete files for "
                "SaveCheckpoint; remove it."
            )
        trainer.strategy.checkpoint_io = WholeFiles(next_run(_folder(trainer)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the run starts over although an earlier one could be resumed."""
        self._signals.listen()  # before Lightning, so that our handlers are restored after training
        self.last_model_path = str(trainer.ckpt_path or "")
        if not self.last_model_path and (found := newest_first(_folder(trainer))):
            rank_zero_warn(
                f"{found[0]} is of an earlier run. This run starts from scratch, and its "
                "checkpoints will replace the earlier ones; to resume the earlier run, stop now "
                "and add `--ckpt_path last`."
            )
        if trainer.is_global_zero:
            remove_partial(_folder(trainer))
        self._ended_early = self._ended_early and bool(trainer.ckpt_path)
        if self._ended_early:
            trainer.should_stop = True
            rank_zero_info(
                f"Training has ended early, at the step of {trainer.ckpt_path}: nothing more is "
                "trained. To train on, resume from a checkpoint before it."
            )
        elif trainer.max_steps == 0:  # no step after which to save
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store whether training has ended before its last step."""
        checkpoint["ended_early"] = self._ended_early

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Know it again."""
        self._ended_early = checkpoint.get("ended_early", False)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take signals over from Lightning."""
        self._signals.listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take signals over from Lightning, and check that all ranks start at the same step.

        Raises:
            ValueError: Ranks start at different steps.
        """
        self._signals.listen()
        self._step = trainer.global_step
        self._figures = self._of_this_run(trainer)
        first = trainer.strategy.broadcast(self._step)
        if not trainer.strategy.reduce_boolean_decision(first == self._step, all=True):
            raise ValueError(
                f"Rank {trainer.global_rank} starts at step {self._step}, rank 0 at step {first}: "
                f"they do not see the same checkpoints. `default_root_dir` "
                f"{trainer.default_root_dir} must be on a file system that all nodes share."
            )

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save every `every_n_steps` optimiser steps, and after a signal."""
        stop = self._asked_to_stop(trainer)
        if stop or self._step % self.every_n_steps == 0:
            self._save(trainer)
        if stop:
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the validated state if it is among the best.

        Raises:
            ValueError: Validation has not logged `monitor`.
        """
        if not self.keep_best or is_trial(trainer) or trainer.state.fn != TrainerFn.FITTING:
            return
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            raise ValueError(
                f"`monitor` is {self.monitor!r}, which validation does not log; it logs "
                f"{', '.join(sorted(logged)) or 'nothing'}."
            )
        figure, path = float(logged[self.monitor]), _path(trainer)
        if trainer.sanity_checking or not math.isfinite(figure):
            return
        if trainer.fit_loop.epoch_loop._should_accumulate():
            raise ValueError(
                f"Validation falls between the {trainer.accumulate_grad_batches} batches of a step "
                "(`trainer.accumulate_grad_batches`), when no checkpoint can be saved; set "
                "`trainer.val_check_interval` to a multiple of it, or `keep_best` to 0."
            )
        figures = self._figures | {path.name: figure}
        chosen = dict(sorted(figures.items(), key=lambda item: item[1])[: self.keep_best])
        if trainer.strategy.broadcast(path.name in chosen):  # rank 0 decides, all ranks save
            self._save(trainer)
            self._figures = chosen
            self._note(trainer)
            self._tidy(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state, from which an export can be repeated."""
        if self.keep_best and not self._figures:
            rank_zero_warn(
                f"`keep_best` is {self.keep_best}, and no validation has given a figure; lower "
                "`trainer.val_check_interval`."
            )
        stop = self._asked_to_stop(trainer)
        early = trainer.global_step < trainer.estimated_stepping_batches
        if early and not (stop or self._ended_early or _out_of_time(trainer)):
            self._ended_early = True
            self.last_model_path = ""  # the checkpoint of this step does not record the end
        self._save(trainer)
        if stop:
            self._leave(trainer)
        self._signals.at_once = True

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Report how to resume a run that was stopped while it exported."""
        if isinstance(exception, Preempted) and self._signals.at_once:
            self._signals.at_once = False  # a further signal must not end the request
            self._say(trainer)
        self._signals.ignore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the former signal handlers."""
        self._signals.ignore()

    def _refuse_diverged(self, trainer: Trainer) -> None:
        """Refuse to save parameters that are infinite or NaN.

        Raises:
            FloatingPointError: A step has made trained parameters infinite or NaN; names the step
                and the last good checkpoint.
        """
        trained = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
        shares = (getattr(p, "ds_tensor", p) for p in trained)  # DeepSpeed: the local shard
        finite = all(bool(share.isfinite().all()) for share in shares)
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise FloatingPointError(
                f"Step {trainer.global_step} made parameters infinite or NaN, and they are not "
                f"saved; last good checkpoint: {self.last_model_path or 'none was saved'}. "
                "Start again with a lower learning rate (`--model.optimizer.lr`, and "
                "`--model.settle.train.lr` if masks are learned)."
            )

    def _asked_to_stop(self, trainer: Trainer) -> bool:
        """Test whether a signal has arrived on any rank; ranks agree on it, since the same signal
        may arrive during a step of one rank and between two steps of another.
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
        path = _path(trainer)
        if is_trial(trainer) or str(path) == self.last_model_path:
            return
        self._refuse_diverged(trainer)
        self._note(trainer)  # before this run overwrites a file of an earlier run
        trainer.save_checkpoint(path, weights_only=False)  # returns when rank 0 has written
        self.last_model_path = str(path)
        self._tidy(trainer)

    def _note(self, trainer: Trainer) -> None:
        """Record which checkpoints are best."""
        if trainer.is_global_zero:
            write_figures(_folder(trainer), self._chosen_by, self._figures)

    def _tidy(self, trainer: Trainer) -> None:
        """Remove checkpoints that are neither among the newest nor among the best."""
        if trainer.is_global_zero:
            for old in newest_first(_folder(trainer))[self.keep :]:
                if old.name not in self._figures:
                    old.unlink(missing_ok=True)

    @property
    def _chosen_by(self) -> str | None:
        """The figure that selects checkpoints; None without `keep_best`."""
        return self.monitor if self.keep_best else None

    def _of_this_run(self, trainer: Trainer) -> dict[str, float]:
        """The recorded figures up to the step at which this run starts; later ones belong to an
        earlier run, and this run writes other checkpoints under the same names.
        """
        if not trainer.global_step:
            return {}
        folder = _folder(trainer)
        return {
            name: figure
            for name, figure in read_figures(folder, self._chosen_by).items()
            if (step_of(name) or 0) <= trainer.global_step and (folder / name).exists()
        }


def _out_of_time(trainer: Trainer) -> bool:
    """Test whether training ends because of `trainer.max_time`; a resumed run may continue."""
    timers = (c for c in trainer.callbacks if isinstance(c, Timer))  # type: ignore[attr-defined]
    return any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


def _path(trainer: Trainer) -> Path:
    return _folder(trainer) / f"step={trainer.global_step}.ckpt"
