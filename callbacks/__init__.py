"""Lightning callbacks: when to prune, log and save, around the maths of `pruning`."""

if __name__ == "callbacks":
    raise ImportError("This package is secateur.callbacks now; see `python -m secateur --help`.")

from secateur.callbacks.anneal_sparsity import AnnealSparsity
from secateur.callbacks.export_model import ExportModel
from secateur.callbacks.plot_widths import PlotWidths
from secateur.callbacks.prune_blocks import PruneBlocks
from secateur.callbacks.prune_weights import PruneWeights
from secateur.callbacks.prune_widths import PruneWidths
from secateur.callbacks.save_checkpoint import SaveCheckpoint
from secateur.callbacks.settle_now import SettleNow
from secateur.callbacks.show_progress import ShowProgress
from secateur.callbacks.track_budget import TrackBudget
from secateur.callbacks.watch_ranks import WatchRanks

__all__ = [
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
]
