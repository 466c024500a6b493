"""Keep what is needed to resume."""

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
    """Writes checkpoints whole or not at all, with a checksum, and straight into the file:
    Lightning's own way holds the file in memory first.

    Args:
        run: Number of this launch in the folder, 1 or more: its checkpoints are newer than those of
            lower ones.
    """

    def __init__(self, run: int) -> None:
        super().__init__()
        self.run = run

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write on this rank; returns when the file outlasts a loss of power."""

        def write(file: BinaryIO) -> None:
            torch.save(checkpoint, file)
            seal(file, self.run, checkpoint["global_step"])

        write_whole(Path(path), write)


class SaveCheckpoint(Checkpoint):
    """Save every few steps, and at the end, into `<trainer.default_root_dir>/checkpoints`.

    A checkpoint holds what trains, the optimiser, the loops and the position in the data; the
    frozen base model is named by its fingerprint. Files are written whole or not at all, and carry
    a checksum.

    A run that is asked to stop, by Ctrl-C, SIGHUP, SIGUSR1 or SIGTERM on any of its ranks, ends the
    step, saves, and exits with code 75; a second Ctrl-C ends it at once. If it is a step of a SLURM
    job, the job is requeued first; see docs/slurm.md.

    Training that ended before its last step, as early stopping makes it, has ended for good: from
    its last checkpoint the export is repeated, and nothing more is trained.

    Beside the newest checkpoints, those with the lowest figures of a validation can stay. They are
    noted in `checkpoints/best.json`, and `--ckpt_path best` is the first of them.

    Args:
        every_n_steps: Optimiser steps between two checkpoints, 1 or more.
        keep: Number of newest checkpoints that stay, 1 or more.
        keep_best: Number of best checkpoints that stay whatever their age, 0 or more. Every
            validation takes part, also between two checkpoints; of equal figures the first wins.
        monitor: Name of the figure that validation logs, on all ranks the same; lower is better.
            Where sparsity rises or blocks go, early steps have the lower figures.

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
        self._figures: dict[str, float] = {}  # of the best checkpoints, lowest first
        self._ended_early = False
        self._step = 0
        self._signals = Signals()

    def check_first(self, trainer: Trainer, module: LightningModule) -> None:
        """Check, before anything is read, that there will be something to choose by.

        Raises:
            ValueError: There is no validation, or it falls between the batches of a step.
        """
        if self.keep_best and trainer.limit_val_batches == 0:
            raise ValueError(
                f"`keep_best` is {self.keep_best} and `trainer.limit_val_batches` is 0: without "
                "validation no checkpoint is better than another. Set one of them otherwise."
            )
        every, batches = trainer.val_check_interval, trainer.accumulate_grad_batches
        if self.keep_best and isinstance(every, int) and every % batches:
            raise ValueError(
                f"`keep_best` is {self.keep_best}: validation every {every} batches falls between "
                f"the {batches} of a step (`trainer.accumulate_grad_batches`), where nothing can "
                f"be saved; set `trainer.val_check_interval` to a multiple of {batches}."
            )

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
        trainer.strategy.checkpoint_io = WholeFiles(next_run(_folder(trainer)))

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
        self._ended_early = self._ended_early and bool(trainer.ckpt_path)
        if self._ended_early:
            trainer.should_stop = True
            rank_zero_info(
                f"Training has ended early, at the step of {trainer.ckpt_path}: nothing more is "
                "trained. To train on, resume from a checkpoint before it."
            )
        elif trainer.max_steps == 0:  # no step will end at which to save
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
        """Take signals over from Lightning, and see that all ranks start at one place.

        Raises:
            ValueError: They do not.
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

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what has been validated, if it is among the best.

        Raises:
            ValueError: Validation has logged nothing under the name of `monitor`.
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
                "(`trainer.accumulate_grad_batches`), where nothing can be saved; set "
                "`trainer.val_check_interval` to a multiple of it, or `keep_best` to 0."
            )
        figures = self._figures | {path.name: figure}
        chosen = dict(sorted(figures.items(), key=lambda item: item[1])[: self.keep_best])
        if trainer.strategy.broadcast(path.name in chosen):  # rank 0 decides, all have to save
            self._save(trainer)
            self._figures = chosen
            self._note(trainer)
            self._tidy(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what training ended with, from which an export can be repeated."""
        if self.keep_best and not self._figures:
            rank_zero_warn(
                f"`keep_best` is {self.keep_best}, and no validation has given a figure; lower "
                "`trainer.val_check_interval`."
            )
        stop = self._asked_to_stop(trainer)
        early = trainer.global_step < trainer.estimated_stepping_batches
        if early and not (stop or self._ended_early or _out_of_time(trainer)):
            self._ended_early = True
            self.last_model_path = ""  # that of this step does not know
        self._save(trainer)
        if stop:
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
                "`--model.settle.train.lr` where masks are learned)."
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
        path = _path(trainer)
        if is_trial(trainer) or str(path) == self.last_model_path:
            return
        self._refuse_diverged(trainer)
        self._note(trainer)  # before a file of this run takes the name of one of an earlier run
        trainer.save_checkpoint(path, weights_only=False)  # returns when rank 0 has written
        self.last_model_path = str(path)
        self._tidy(trainer)

    def _note(self, trainer: Trainer) -> None:
        """Note which checkpoints are best."""
        if trainer.is_global_zero:
            write_figures(_folder(trainer), self._chosen_by, self._figures)

    def _tidy(self, trainer: Trainer) -> None:
        """Remove what is neither among the newest nor among the best."""
        if trainer.is_global_zero:
            for old in newest_first(_folder(trainer))[self.keep :]:
                if old.name not in self._figures:
                    old.unlink(missing_ok=True)

    @property
    def _chosen_by(self) -> str | None:
        """Nothing is chosen without `keep_best`, but what has been stays."""
        return self.monitor if self.keep_best else None

    def _of_this_run(self, trainer: Trainer) -> dict[str, float]:
        """What is noted up to the step at which this run starts: the rest an earlier run has
        reached on another way, and this run writes other checkpoints under the same names.
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
    """Whether training ends because of `trainer.max_time`, of which there may be more next time."""
    timers = (c for c in trainer.callbacks if isinstance(c, Timer))  # type: ignore[attr-defined]
    return any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


def _path(trainer: Trainer) -> Path:
    return _folder(trainer) / f"step={trainer.global_step}.ckpt"
