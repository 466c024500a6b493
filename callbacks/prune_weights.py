"""Set weights to zero while a model trains, and keep them zero: sparse fine-tuning.

Sources: each part in pruning/weights names its paper. Pruning at once and training afterwards
follows "A Simple and Effective Pruning Approach" (Wanda, arXiv 2306.11695, section 4); gradual
pruning is defined in `secateur.pruning.weights.gradually`.

The file is long because each hook of a run needs a few lines here; the methods are in
pruning/weights.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

import secateur.pruning.weights
from secateur.callbacks._after_step import AfterStep
from secateur.callbacks._held_masks import HeldMasks, take_out_updates
from secateur.callbacks._trial import is_trial
from secateur.callbacks._weight_blocks import store_of
from secateur.callbacks.prune import Prune, check_at_least
from secateur.pruning.blocks.linears import linears_of
from secateur.pruning.blocks.source import LiveBlocks
from secateur.pruning.commands import import_all
from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.protocols import TrainsWeights
from secateur.pruning.weights.gradually import Gradually
from secateur.pruning.weights.guard import Decision, decide
from secateur.pruning.weights.layers import AllLinears, LayerSelection
from secateur.pruning.weights.loop import prune_weights, run_settings
from secateur.pruning.weights.masks import WeightMasks, pack, unpack
from secateur.pruning.weights.parts import Allocation, Compensation, Refinement, Score, Uniform
from secateur.pruning.weights.pattern import Pattern
from secateur.pruning.weights.recipe import WeightRecipe
from secateur.pruning.weights.sparsity import sparsity_report
from secateur.pruning.weights.store import BlockStore, delete_blocks
from secateur.pruning.weights.wanda import Wanda

_BLOCKS = "blocks"  # the finished blocks of a pruning, below `folder`

import_all(secateur.pruning.weights)


class PruneWeights(AfterStep, Prune):
    """Set weights to zero block by block, train on, and keep the zeros.

    Gradients are masked before every optimiser step, and weights after it; low-rank updates are
    trained and merged under the masks. Masks are part of the checkpoint, one bit per weight. At the
    end, a removed weight that is not zero is an error.

    Written below `folder`: the achieved sparsity in `sparsity.json`, `sparsity.txt` and
    `sparsity.png`; `masks.safetensors`; and, until the run has ended without an error, the finished
    `blocks`, as large as the pruned matrices: a run that was killed resumes at the block that it
    had reached.

    Compensation, allocation and refinement are tried first, and left out if they raise the
    perplexity of held-back windows; log and report state this. If the sparsity rises gradually,
    this is decided once, before the first pruning, at the final sparsity.

    Rank 0 prunes while other ranks wait: raise the `timeout` of the strategy if that takes long.
    The folder must be on a file system that all ranks see.

    Args:
        pattern: How many entries of every group are removed: `Unstructured` or `NM`.
        score: Which weights are kept: `Magnitude`, `Wanda` (if not given), `DaSS`, `ObsSaliency`
            or `JointSaliency`.
        allocation: How the sparsity is spread over the blocks: `Uniform` (if not given) or
            `AlphaPruning`.
        refinement: Changes the masks: `DSnoT` or `Barber`; none if not given.
        compensation: Changes the kept weights: `SparseGPTSweep`, `LeastSquares` or
            `ResidualLeastSquares`; none if not given.
        matrices: Which matrices are pruned: `AllLinears` (if not given), `MlpOnly` or
            `AttentionOnly`.
        gradually: How the sparsity rises while the model trains; all at once before the first step
            if not given.
        calibration_windows: Windows of the training text to compute statistics on, 1 or more.
        held_back_windows: Further windows, to test the parts on and to measure, 1 or more.
        calibration_seed: Seed of the draw of all these windows, 0 or more.
        calibration_batch_size: Windows per forward pass of a block, 1 or more.
        folder: Where results go, below `trainer.default_root_dir`.

    Raises:
        ValueError: A setting is outside its range, or the pattern has only one sparsity and is to
            be reached gradually.
    """

    def __init__(
        self,
        pattern: Pattern,
        score: Score | None = None,
        allocation: Allocation | None = None,
        refinement: Refinement | None = None,
        compensation: Compensation | None = None,
        matrices: LayerSelection | None = None,
        gradually: Gradually | None = None,
        calibration_windows: int = 128,
        held_back_windows: int = 32,
        calibration_seed: int = 0,
        calibration_batch_size: int = 8,
        folder: str = "weights",
    ) -> None:
        super().__init__(calibration_windows, held_back_windows, calibration_seed, folder)
        check_at_least(1, calibration_batch_size=calibration_batch_size)
        self.recipe = WeightRecipe(
            pattern=pattern,
            score=score or Wanda(),
            allocation=allocation or Uniform(),
            refinement=refinement,
            compensation=compensation,
            matrices=matrices or AllLinears(),
        )
        if gradually is not None:
            try:
                pattern.with_sparsity(pattern.sparsity / 2)
            except ValueError as error:
                raise ValueError(f"`gradually` does not suit `pattern`: {error}") from error
        self.gradually = gradually
        self.calibration_batch_size = calibration_batch_size
        self.masks = WeightMasks()
        """The kept weights, by the names of the parameters in the live model."""
        self._decision: Decision | None = None
        self._kept_blocks: list[int] = []
        self._held: HeldMasks | None = None
        self._trial: TemporaryDirectory[str] | None = None

    def check_first(self, trainer: Trainer, module: LightningModule) -> None:
        """Check at once that recipe, model and strategy are compatible.

        Raises:
            ValueError: They are not.
        """
        trained = self.pruned(module)
        # Strategies that divide or copy weights, DeepSpeed's among them, are subclasses of DDP's.
        if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
            raise ValueError(
                f"Masks cannot be held under `trainer.strategy` {type(trainer.strategy).__name__}, "
                "which shards weights or optimiser states. Use one device or ddp, with "
                "`--model.lora.rank 8` if memory is short."
            )
        self.recipe.check(linears_of(trained.base_model.skeleton()))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune what is due at once; apply the masks of a checkpoint.

        Raises:
            ValueError: The sparsity would not be reached in time, the model cannot be pruned in
                this way, or weights of a checkpoint violate its masks.
        """
        module = self.pruned(pl_module)
        self.check_first(trainer, pl_module)
        steps = int(trainer.estimated_stepping_batches)
        if self.gradually is not None and (last := self.gradually.last_step(steps)) >= steps:
            raise ValueError(
                f"`gradually` {self.gradually.settings()} would reach the sparsity before step "
                f"{last}, and training has {steps} steps; raise `trainer.max_steps`, or lower "
                "`over` or `every_n_steps`."
            )
        self._release()
        self._hold(module)
        if self.history:
            self._verify(module, "the checkpoint was loaded")
        if trainer.ckpt_path is None:  # else optimiser and step are not loaded yet
            self.catch_up(trainer, module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Zero the gradients of the removed weights."""
        if self._held is not None:
            self._held.mask_gradients()

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the removed weights to zero again after an optimiser step.

        Raises:
            ValueError: Blocks were removed after the masks were made.
        """
        if self._held is None:
            return
        if self._kept_blocks != self.pruned(pl_module).kept_blocks:
            raise ValueError(
                "Blocks were removed after weights were pruned, so that the masks no longer match "
                "the blocks. Put PruneBlocks, with `removals` AtOnce, before PruneWeights."
            )
        self._held.apply()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that all removed weights are zero, before the last checkpoint is written.

        Raises:
            ValueError: A removed weight is not zero.
        """
        self._verify(self.pruned(pl_module), "the last step")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the same check after the other callbacks of the end of training.

        Raises:
            ValueError: A removed weight is not zero, or nothing was pruned.
        """
        if not self.history:
            raise ValueError(
                "PruneWeights has pruned nothing: the checkpoint has no masks and no step was "
                "left. Start without `--ckpt_path`."
            )
        self._verify(self.pruned(pl_module), "the end of training")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure low-rank updates under the masks of the checkpoint."""
        self._hold(self.pruned(pl_module))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self._hold(self.pruned(pl_module))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self._hold(self.pruned(pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the finished blocks after a run without errors; not called after an error."""
        if stage == "fit" and trainer.is_global_zero:
            delete_blocks(self._path(trainer) / _BLOCKS)
            if self._trial is not None:
                self._trial.cleanup()
                self._trial = None

    def state_dict(self) -> dict[str, Any]:
        """Masks, the history of prunings, and the settings that decide the rest."""
        masks = {}
        for name in self.masks:
            mask_OI = self.masks[name]
            masks[name] = {"packed": pack(mask_OI), "shape": list(mask_OI.shape)}
        return super().state_dict() | {
            "decision": self._decision and asdict(self._decision),
            "kept_blocks": self._kept_blocks,
            "masks": masks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It was written under other settings.
        """
        super().load_state_dict(state_dict)
        decision = state_dict["decision"]
        self._decision = decision and Decision(**decision)
        self._kept_blocks = state_dict["kept_blocks"]
        self.masks = WeightMasks()
        for name, mask in state_dict["masks"].items():
            rows, columns = mask["shape"]
            self.masks.add(name, unpack(mask["packed"], (rows, columns)))
        self._release()

    def settings(self) -> dict[str, Any]:
        return self.recipe.settings() | {
            "gradually": self.gradually and self.gradually.settings(),
            "calibration_windows": self.calibration_windows,
            "held_back_windows": self.held_back_windows,
            "calibration_seed": self.calibration_seed,
            "calibration_batch_size": self.calibration_batch_size,
        }

    def _path(self, trainer: Trainer) -> Path:
        """Where results go; a trial run uses a temporary folder beside it."""
        folder = Path(trainer.default_root_dir).absolute() / self.folder
        if not is_trial(trainer):
            return folder
        if self._trial is None:
            there = next(parent for parent in folder.parents if parent.is_dir())
            self._trial = TemporaryDirectory(prefix=f".{folder.name}-trial-", dir=there)
        return Path(self._trial.name)

    def _hold(self, module: TrainsWeights) -> None:
        if self._held is None and self.history:
            self._held = HeldMasks(module.model, self.masks)

    def _release(self) -> None:
        if self._held is not None:
            self._held.release()
        self._held = None

    def _verify(self, module: TrainsWeights, where: str) -> None:
        with module.plain() as model:
            lost = self.masks.lost(model)
        if lost:
            raise ValueError(
                f"After {where}, {sum(lost.values())} weights that were removed are not zero, "
                f"in {len(lost)} matrices, {min(lost)} first: something other than PruneWeights "
                "has changed weights. Look for an optimiser, strategy or callback that keeps "
                "copies of the weights (averages, master copies) and leave it out."
            )

    def catch_up(self, trainer: Trainer, module: TrainsWeights) -> None:
        final, step = self.recipe.pattern.sparsity, 0
        if self.gradually is not None:
            steps = int(trainer.estimated_stepping_batches)
            step = self.gradually.due(trainer.global_step, steps)
            final = self.gradually.sparsity(step, steps, final)
        done = self.history[-1]["step"] if self.history else -1
        if step > done and (self.gradually is None or step > 0):
            self._prune(trainer, module, step, final)

    def _prune(self, trainer: Trainer, module: TrainsWeights, step: int, sparsity: float) -> None:
        recipe = replace(self.recipe, pattern=self.recipe.pattern.with_sparsity(sparsity))
        event: dict[str, Any] = {}
        store: BlockStore | None = None
        if trainer.is_global_zero:  # the others wait for the result
            store, event = self._work(trainer, module, step, recipe)
        news = trainer.strategy.broadcast((store, event, self._decision))
        store, event, self._decision = news
        assert store is not None
        self.masks, prefix = WeightMasks(), family_of(module.model.config).blocks
        for index, block in enumerate(blocks_of(module.model, family_of(module.model.config))):
            done = store.load(index, block)
            assert done is not None
            for path, mask_OI in done.masks.items():
                self.masks.add(f"{prefix}.{index}.{path}.weight", mask_OI)
        take_out_updates(module.model, self.masks)
        self._release()
        self.history.append(event)
        self._kept_blocks = list(module.kept_blocks)
        self._hold(module)
        assert self._held is not None
        self._held.apply()
        if trainer.is_global_zero:
            self.masks.save(self._path(trainer))
        module.record("weights", self._provenance())
        self._verify(module, "pruning")
        self.publish(trainer, event)
        for note in event["notes"]:
            rank_zero_info(note)
        rank_zero_info(
            f"Step {trainer.global_step}: {event['linear_sparsity']:.4f} of the linear layers are "
            f"zero; perplexity of the windows held back {event['perplexity_before']:.2f} -> "
            f"{event['perplexity_after']:.2f}."
        )

    def _work(
        self, trainer: Trainer, module: TrainsWeights, step: int, recipe: WeightRecipe
    ) -> tuple[BlockStore, dict[str, Any]]:
        """Prune a copy without updates into the store, and measure its quality."""
        windows_NT, held_back_MT = self.split_windows(trainer)
        with module.plain() as model:
            source, batch_size = LiveBlocks(model), self.calibration_batch_size
            settings = run_settings(source, recipe, windows_NT, held_back_MT, batch_size)
            store = store_of(self._path(trainer) / _BLOCKS, settings, step)
            if self._decision is None:
                self._decision = decide(source, self.recipe, windows_NT, held_back_MT, batch_size)
            share = recipe.pattern.sparsity / (self.recipe.pattern.sparsity or 1.0)
            before = perplexity(model, held_back_MT)
            found = prune_weights(
                source,
                recipe,
                windows_NT,
                held_back_NT=held_back_MT,
                decision=self._decision.scaled(share),
                batch_size=batch_size,
                store=store,
            )
            after = perplexity(model, held_back_MT)
            report = sparsity_report(model, found.masks, found.notes)
        report.save(self._path(trainer))
        event = {
            "step": step,
            "applied": found.recipe.settings(),
            "asked_sparsities": found.sparsities,
            "linear_sparsity": report.linear_sparsity,
            "pruned_sparsity": report.pruned_sparsity,
            "model_sparsity": report.model_sparsity,
            "matrices_for_2of4_kernels": sum(matrix.fits_2of4 for matrix in report.matrices),
            "matrices": len(report.matrices),
            "perplexity_before": before.value,
            "perplexity_after": after.value,
            "notes": found.notes,
        }
        return store, event

    def _provenance(self) -> dict[str, Any]:
        """The settings and the last pruning, for the model card."""
        return {"settings": self.settings(), "prunings": len(self.history)} | self.history[-1]
