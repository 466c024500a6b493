"""Training-aware pruning of large language models.

`import secateur as sc` gives every public name, each imported when it is first used. They are
defined in `secateur.pruning` (the methods), `secateur.modules` (training modules and data) and
`secateur.callbacks` (when things happen); the program is `python -m secateur`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "pruning.plan": ("Plan",),
    "pruning.costs": ("Bytes", "Flops", "Parameters"),
    "pruning.widths.latency": ("Latency",),
    "pruning.schedules": ("Cosine", "Cubic", "Linear"),
    "pruning.losses": ("LossWeights",),
    "pruning.lora": ("LoRA",),
    "pruning.files.base_model": ("BaseModel",),
    "pruning.widths.budget": ("Budget",),
    "pruning.widths.evolution": ("Evolution",),
    "pruning.widths.exchange": ("Exchange",),
    "pruning.widths.feature_statistics": ("Fluctuation", "WandaWidth"),
    "pruning.widths.gate_gradient": ("Fisher", "GateGradient"),
    "pruning.widths.gate_taylor": ("GateTaylor",),
    "pruning.widths.gradual_ranking": ("GradualRanking",),
    "pruning.widths.learning": ("ExactBudget", "GateLearning", "Importance", "Penalty"),
    "pruning.widths.lora_taylor": ("LoRATaylor",),
    "pruning.widths.policy_gradient": ("LeaveOneOut", "MovingAverage", "PolicyGradient"),
    "pruning.blocks.refit": ("Refit", "refit"),
    "pruning.widths.sizes": ("Sizes",),
    "pruning.widths.width_magnitude": ("RandomOrder", "WidthMagnitude"),
    "pruning.widths.gates": (
        "GateSampler",
        "Logistic",
        "ReferenceGumbel",
        "ReinMax",
        "Soft",
        "StraightThrough",
    ),
    "pruning.widths.gate_hooks": ("GateHooks",),
    "pruning.widths.hypernetwork": (
        "FreeLogits",
        "GRUHypernetwork",
        "NoRecurrence",
        "SharedHeads",
    ),
    "pruning.depth": (
        "AngularDistance",
        "BlockFraction",
        "BlockInfluence",
        "BlockMagnitude",
        "Blocks",
        "Cached",
        "Greedy",
        "HalfBlocks",
        "OneShot",
        "Perplexity",
        "Taylor",
        "WholeBlocks",
        "remove_blocks",
    ),
    "pruning.weights.alpha_pruning": ("AlphaPruning",),
    "pruning.weights.joint_saliency": ("JointSaliency",),
    "pruning.weights.dass": ("DaSS",),
    "pruning.weights.dsnot": ("DSnoT",),
    "pruning.weights.least_squares": ("LeastSquares",),
    "pruning.weights.loop": ("prune_weights",),
    "pruning.weights.magnitude": ("Magnitude",),
    "pruning.weights.pattern": ("NM", "Unstructured"),
    "pruning.weights.recipe": ("WeightRecipe",),
    "pruning.weights.sparse_gpt": ("ObsSaliency", "SparseGPTSweep"),
    "pruning.weights.wanda": ("Wanda",),
    "pruning.blocks.source": ("LiveBlocks", "StreamedBlocks"),
    "pruning.weights.sparsity": ("sparsity_report",),
    "pruning.weights.store": ("BlockStore",),
    "pruning.measure.zero_shot": ("read_questions", "zero_shot"),
    "pruning.export.cut": ("cut",),
    "pruning.export.deliver": ("deliver", "export"),
    "pruning.export.rewrite": ("prune_blocks", "prune_checkpoint", "write_pruned_checkpoint"),
    "pruning.measure.latency": ("measure_latency",),
    "pruning.measure.report": ("measure",),
    "pruning.measure.compare": ("compare_folders",),
    "modules": (
        "CausalLM",
        "InstructionData",
        "MaskLearning",
        "ShardedDDP",
        "TextData",
        "Zero",
    ),
    "modules.data.templates": ("Alpaca", "Chat"),
    "modules.rate_schedule": ("RateSchedule",),
    "modules.settling": ("AllWeights", "Gains", "LowRank", "Settle"),
    "callbacks": (
        "AnnealSparsity",
        "ExportModel",
        "PlotWidths",
        "PruneBlocks",
        "PruneWeights",
        "PruneWidths",
        "SaveCheckpoint",
        "SettleNow",
        "ShowProgress",
        "TrackBudget",
        "WatchRanks",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
