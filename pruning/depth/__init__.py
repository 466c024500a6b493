"""Depth pruning: score blocks, choose which to remove, remove them from models and checkpoints."""

from secateur.pruning.depth.cache import Cached
from secateur.pruning.depth.compensation import Compensation, ScaledStream
from secateur.pruning.depth.perplexity_score import Perplexity
from secateur.pruning.depth.removal import bypassed, remove_blocks, shortened_config
from secateur.pruning.depth.scores import BlockMagnitude, BlockScore, BlockScores, ReverseOrder
from secateur.pruning.depth.search import BlockChoice, Greedy, OneShot, Search
from secateur.pruning.depth.similarity import AngularDistance, BlockInfluence
from secateur.pruning.depth.target import (
    BlockFraction,
    Blocks,
    FlopsFraction,
    Fractions,
    ParameterFraction,
    Target,
    UnitCount,
    fractions,
)
from secateur.pruning.depth.taylor import Taylor, peak_bytes
from secateur.pruning.depth.units import HalfBlocks, Unit, Units, WholeBlocks

__all__ = [
    "AngularDistance",
    "BlockChoice",
    "BlockFraction",
    "BlockInfluence",
    "BlockMagnitude",
    "BlockScore",
    "BlockScores",
    "Blocks",
    "Cached",
    "Compensation",
    "FlopsFraction",
    "Fractions",
    "Greedy",
    "HalfBlocks",
    "OneShot",
    "ParameterFraction",
    "Perplexity",
    "ReverseOrder",
    "ScaledStream",
    "Search",
    "Target",
    "Taylor",
    "Unit",
    "UnitCount",
    "Units",
    "WholeBlocks",
    "bypassed",
    "fractions",
    "peak_bytes",
    "remove_blocks",
    "shortened_config",
]
