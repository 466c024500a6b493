"""Heads of attention, and what a configuration says of them.

Heads are pruned in groups: a key-value head with the query heads that read it. Groups follow each
other in the features of queries, keys and values, so those of a group are neighbours.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

HEADS = "attn_heads"
"""The site whose entries are the groups of heads of a block."""


def head_dim(config: PreTrainedConfig) -> int:
    """Features of one head, of queries as of keys and values."""
    found: Any = config
    return int(getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads)


def num_groups(config: PreTrainedConfig) -> int:
    """Groups of heads of an attention: its key-value heads."""
    found: Any = config
    return int(getattr(found, "num_key_value_heads", None) or found.num_attention_heads)


def fields_of_heads(config: PreTrainedConfig, groups: int) -> dict[str, int]:
    """Fields of the configuration of a model with another number of groups.

    Args:
        config: The configuration of the model before.
        groups: Number of groups, 1 or more.
    """
    queries: int = config.num_attention_heads // num_groups(config)
    return {
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "head_dim": head_dim(config),
    }


def never(width: int, heads: int) -> bool:
    """The configuration has no `head_dim`: its heads fill the residual stream."""
    return False


def always(width: int, heads: int) -> bool:
    """The configuration has a `head_dim` beside any number of query heads."""
    return True


def if_they_divide(width: int, heads: int) -> bool:
    """Transformers refuses a number of query heads that does not divide the residual stream."""
    return width % heads == 0
