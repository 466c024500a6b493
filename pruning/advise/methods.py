"""What each method leaves, costs and takes, from measurements of this machine and this model.

What nobody has measured is not told: an expected loss is an interval from the loss that one-shot
pruning had here, scaled by what the method made of it in docs/, to that loss unscaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from secateur.pruning.advise.probe import Losses, Times
from secateur.pruning.families import skeleton
from secateur.pruning.measure.sizes import count
from secateur.pruning.progress import duration
from secateur.pruning.widths.memory import Run, footprint

BATCH = 8
"""Windows of a step of the commands."""
_DEPTH_WINDOWS = 32
_MASK_STEPS, _SETTLED_SHARE = 1000, 0.3
_BLOCKS, _UNIFORM, _WIDTHS, _LEARNED_WIDTHS = (
    f"runs/{name}" for name in ("blocks", "uniform", "widths", "learned")
)
# docs/disp.md: time of ranking and refit, and of steps, over a forward and backward pass.
_RANK_AND_REFIT_STEPS, _MASK_STEP, _SETTLED_STEP = 210, 1.11, 1.8
# docs/disp.md, kept 0.5, excess over that of masks alone: 0.164 and 0.160 of 0.357.
_REFIT, _LEARNED = 0.164 / 0.357, 0.160 / 0.357
# docs/choose.md, a decision: after the refit, over what `advise` measured of the same model before.
_REFIT_ALIKE = 0.628 / 2.56
# docs/depth.md, after 3 of 8 blocks on c4: ln(129.73 / 109.27) over ln(213.23 / 109.27).
_GREEDY = 0.1717 / 0.6685


@dataclass(frozen=True)
class Advice:
    """What one method comes to.

    Args:
        title: The method.
        folder: Where its run puts everything.
        facts: What remains, loss, time, memory: name to words.
        command: What to type.
    """

    title: str
    folder: str
    facts: Mapping[str, str]
    command: str


@dataclass(frozen=True)
class Setting:
    """What the methods are asked for.

    Args:
        model: Folder or hub id, as it is typed.
        text: Files of text, as they are typed.
        config: Of the model.
        run: What decides the memory of a step.
        keep: Fraction of the FLOPs of the blocks that stays, in (0, 1).
    """

    model: str
    text: str
    config: PreTrainedConfig
    run: Run
    keep: float

    def command(self, recipe: str, folder: str, *settings: str) -> str:
        """A line for a shell that runs a recipe and leaves its results in a folder of their own."""
        lines = [
            f"python -m secateur fit --config configs/{recipe}",
            f"--model.base {self.model} --data.train {self.text}",
            f"--data.window_tokens {self.run.window_tokens} --data.batch_size {BATCH}",
            *settings,
            f"--trainer.default_root_dir {folder}",
        ]
        return " \\\n    ".join(lines)


def advise(asked: Setting, times: Times, losses: Losses) -> list[Advice]:
    """Tell what the methods would come to, the shortest run first.

    Args:
        asked: What they are asked for.
        times: Measured here.
        losses: Measured here.
    """
    stock = [] if losses.uniform is None else [_uniform(asked, times, losses.uniform)]
    shorter = [_blocks(asked, times, losses)] if losses.removed else []
    return [*shorter, *stock, *_widths(asked, times, losses)]


def comparison(model: str, advice: Sequence[Advice]) -> str:
    """The command that measures what the runs made, on text that none of them has read."""
    made = [f"{Path(one.folder).name}={one.folder}/model" for one in advice]
    return f"python -m secateur compare dense={model} {' '.join(made)} --text OTHER_TEXT --speed"


def _blocks(asked: Setting, times: Times, losses: Losses) -> Advice:
    num_blocks, gone = asked.config.num_hidden_layers, len(losses.removed)
    # Greedy search scores the blocks that are left, each by the passes through those behind it.
    passes = sum((left + 1) / 2 for left in range(num_blocks - gone + 1, num_blocks + 1))
    seconds = passes * _DEPTH_WINDOWS * asked.run.window_tokens * times.forward
    return Advice(
        f"Remove {gone} of {num_blocks} blocks",
        _BLOCKS,
        {
            "remains": f"a stock {asked.config.model_type} of {num_blocks - gone} blocks, which "
            "every server of the family runs",
            "loss": _loss(
                losses.blocks,
                _GREEDY,
                "blocks chosen by influence",
                "docs/depth.md, refit (LLaMA of 7 M parameters)",
            ),
            "run": f"about {duration(seconds)} of scoring, {passes:.0f} passes over "
            f"{_DEPTH_WINDOWS} windows; then refit, export and report",
            "memory": _memory(asked),
        },
        asked.command(
            "depth/prune_only.yaml",
            _BLOCKS,
            f"--callbacks.PruneBlocks.target.fraction {gone / num_blocks:.4f}",
            f"--callbacks.PruneBlocks.calibration_windows {_DEPTH_WINDOWS}",
        ),
    )


def _uniform(asked: Setting, times: Times, loss: float) -> Advice:
    return Advice(
        f"Narrow all MLPs alike, to {asked.keep:.1%} of the blocks with attention whole",
        _UNIFORM,
        {
            "remains": f"a stock {asked.config.model_type} with a smaller MLP, which every server "
            "of the family runs",
            "loss": _loss(
                loss,
                _REFIT_ALIKE,
                "MLPs narrowed alike, not refitted",
                "docs/choose.md, a decision (llama of 135 M parameters)",
            ),
            "run": f"about {duration(_ranked(asked, times))}, as for the next method",
            "memory": _memory(asked),
        },
        asked.command(
            "widths/importance.yaml",
            _UNIFORM,
            f"--callbacks.PruneWidths.budget.keep {asked.keep:.4f}",
            "--callbacks.PruneWidths.budget.uniform true",
        ),
    )


def _ranked(asked: Setting, times: Times) -> float:
    """Seconds of ranking and refit."""
    return _RANK_AND_REFIT_STEPS * BATCH * asked.run.window_tokens * times.backward


def _widths(asked: Setting, times: Times, losses: Losses) -> list[Advice]:
    ranked, step = _ranked(asked, times), BATCH * asked.run.window_tokens * times.backward
    mask = _MASK_STEP * (1 - _SETTLED_SHARE) + _SETTLED_STEP * _SETTLED_SHARE
    learned = ranked + _MASK_STEPS * mask * step
    remains = {
        "remains": f"a {asked.config.model_type} whose blocks have widths of their own; its code "
        "lies in the folder (trust_remote_code; vLLM runs it, llama.cpp does not)"
    }
    peak = footprint(asked.config, asked.run).total / 1e9
    cut_by = "widths cut by importance, not refitted"
    return [
        Advice(
            f"Narrow the blocks to {asked.keep:.1%} by importance, and refit them",
            _WIDTHS,
            remains
            | {
                "loss": _loss(
                    losses.widths,
                    _REFIT,
                    cut_by,
                    "docs/disp.md, importance and refit (LLaMA of 7 M parameters)",
                ),
                "run": f"about {duration(ranked)}, {_RANK_AND_REFIT_STEPS} forward and backward "
                "passes; nothing is trained",
                "memory": _memory(asked),
            },
            asked.command(
                "widths/importance.yaml",
                _WIDTHS,
                f"--callbacks.PruneWidths.budget.keep {asked.keep:.4f}",
            ),
        ),
        Advice(
            f"Learn which widths stay, {asked.keep:.1%} of the blocks, in {_MASK_STEPS} steps",
            _LEARNED_WIDTHS,
            remains
            | {
                "loss": _loss(
                    losses.widths,
                    _LEARNED,
                    cut_by,
                    "docs/disp.md, after 1000 steps (LLaMA of 7 M parameters)",
                ),
                "run": f"about {duration(learned)}: {_MASK_STEPS} steps of {BATCH} windows, "
                "ranking and refit",
                "memory": f"{peak:.1f} GB for a step, predicted from the configuration; "
                f"{_memory(asked)}",
            },
            asked.command(
                "disp.yaml",
                _LEARNED_WIDTHS,
                f"--model.budget.keep {asked.keep:.4f}",
                f"--trainer.max_steps {_MASK_STEPS}",
            ),
        ),
    ]


def _loss(measured: float, scale: float, how: str, source: str) -> str:
    """An expected loss with where it comes from."""
    found = f"{measured:+.2f} nats per token measured here with {how}"
    if measured <= 0:
        return f"{found}; less than that is not expected"
    return (
        f"{found}; {scale * measured:.2f} to {measured:.2f} expected, the lower end scaled as in "
        f"{source}"
    )


def _memory(asked: Setting) -> str:
    """Memory of the export: dense and new model side by side, both in float32 for the proof."""
    parameters = count(skeleton(asked.config)).parameters
    return f"{4 * parameters * (1 + asked.keep) / 1e9:.1f} GB for the proof of the export, counted"
