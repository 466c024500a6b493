"""Depth pruning: score blocks, choose which to remove, remove them from models and checkpoints."""

from pruning.depth.cache import Cached
from pruning.depth.compensation import Compensation, remove_compensated
from pruning.depth.perplexity import Perplexity
from pruning.depth.removal import bypassed, remove_blocks, shortened_config
from pruning.depth.scores import BlockScore, BlockScores, Magnitude, ReverseOrder
from pruning.depth.search import Greedy, OneShot, Search, Selection
from pruning.depth.similarity import AngularDistance, BlockInfluence
from pruning.depth.surgery import prune_blocks
from pruning.depth.target import (
    BlockFraction,
    Blocks,
    FlopsFraction,
    Fractions,
    ParameterFraction,
    Target,
    UnitCount,
    fractions,
)
from pruning.depth.taylor import Taylor, peak_bytes
from pruning.depth.units import HalfBlocks, Unit, Units, WholeBlocks

__all__ = [
    "AngularDistance",
    "BlockFraction",
    "BlockInfluence",
    "BlockScore",
    "BlockScores",
    "Blocks",
    "Cached",
    "Compensation",
    "FlopsFraction",
    "Fractions",
    "Greedy",
    "HalfBlocks",
    "Magnitude",
    "OneShot",
    "ParameterFraction",
    "Perplexity",
    "ReverseOrder",
    "Search",
    "Selection",
    "Target",
    "Taylor",
    "Unit",
    "UnitCount",
    "Units",
    "WholeBlocks",
    "bypassed",
    "fractions",
    "peak_bytes",
    "prune_blocks",
    "remove_blocks",
    "remove_compensated",
    "shortened_config",
]
