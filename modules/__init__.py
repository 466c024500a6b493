"""What is trained and on what: Lightning modules, data modules, loading and sharding."""

from modules.causal_lm import CausalLM
from modules.mask_learning import MaskLearning
from modules.sharded_ddp import ShardedDDP
from modules.text_data import TextData
from modules.zero import Zero

__all__ = ["CausalLM", "MaskLearning", "ShardedDDP", "TextData", "Zero"]
