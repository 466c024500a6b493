"""Depth pruning: score blocks, choose which to remove, remove them from models and checkpoints."""

from pruning.depth.removal import bypassed, remove_blocks, shortened_config
from pruning.depth.scores import BlockScore, BlockScores, Magnitude, ReverseOrder
from pruning.depth.search import Greedy, OneShot, Search, Selection
from pruning.depth.target import (
    BlockFraction,
    Blocks,
    FlopsFraction,
    Fractions,
    ParameterFraction,
    Target,
    fractions,
)
from pruning.depth.units import HalfBlocks, Unit, Units, WholeBlocks

__all__ = [
    "BlockFraction",
    "BlockScore",
    "BlockScores",
    "Blocks",
    "FlopsFraction",
    "Fractions",
    "Greedy",
    "HalfBlocks",
    "Magnitude",
    "OneShot",
    "ParameterFraction",
    "ReverseOrder",
    "Search",
    "Selection",
    "Target",
    "Unit",
    "Units",
    "WholeBlocks",
    "bypassed",
    "fractions",
    "remove_blocks",
    "shortened_config",
]
