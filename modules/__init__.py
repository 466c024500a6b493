"""Lightning modules, data modules, and strategies that load and shard models."""

if __name__ == "modules":
    raise ImportError("This package is secateur.modules now; see `python -m secateur --help`.")

from secateur.modules.causal_lm import CausalLM
from secateur.modules.data.instruction_data import InstructionData
from secateur.modules.data.text_data import TextData
from secateur.modules.mask_learning import MaskLearning
from secateur.modules.strategies.sharded_ddp import ShardedDDP
from secateur.modules.strategies.zero import Zero

__all__ = ["CausalLM", "InstructionData", "MaskLearning", "ShardedDDP", "TextData", "Zero"]
