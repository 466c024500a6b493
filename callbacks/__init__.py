"""When things happen: hooks, logging and state around the maths of `pruning`."""

from callbacks.anneal_sparsity import AnnealSparsity
from callbacks.export_model import ExportModel
from callbacks.plot_widths import PlotWidths
from callbacks.prune_blocks import PruneBlocks
from callbacks.prune_weights import PruneWeights
from callbacks.save_checkpoint import SaveCheckpoint
from callbacks.track_budget import TrackBudget
from callbacks.watch_ranks import WatchRanks

__all__ = [
    "AnnealSparsity",
    "ExportModel",
    "PlotWidths",
    "PruneBlocks",
    "PruneWeights",
    "SaveCheckpoint",
    "TrackBudget",
    "WatchRanks",
]
