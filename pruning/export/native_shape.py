"""The shape of a pruned model, for servers that run it without its modelling file.

Such servers support at most one MLP width and one number of heads per block, and blocks without
attention or MLP. None supports selecting entries of the residual stream.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from secateur.pruning.families import FAMILIES, PARTS
from secateur.pruning.files.model_folder import CONFIG
from secateur.pruning.heads import HEADS, num_groups

_PREFIX = "secateur_"


@dataclass(frozen=True)
class NativeShape:
    """A model that is uncut except for MLP widths, heads and removed parts.

    Args:
        config: Configuration of the stock family, for the remaining blocks.
        mlp_widths: Width of the MLP of every block; 0 if it has none.
        groups: Key-value heads of the attention of every block, each with its query heads; 0 if it
            has none.
    """

    config: PreTrainedConfig
    mlp_widths: tuple[int, ...]
    groups: tuple[int, ...]

    @property
    def has_full_heads(self) -> bool:
        """Whether every attention has the heads that the configuration names."""
        return {*self.groups} <= {0, num_groups(self.config)}

    @property
    def is_stock(self) -> bool:
        """Whether all blocks have the same shape, so that it is a stock model of its family."""
        alike = len({*self.mlp_widths}) == len({*self.groups}) == 1
        return alike and self.mlp_widths[0] > 0 and self.has_full_heads


def read_shape(folder: Path) -> NativeShape:
    """The shape of the model in a folder.

    Args:
        folder: A stock model of a known family, or a pruned one.

    Raises:
        ValueError: The folder holds no model of a known family, or one that selects entries of the
            residual stream.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a model folder: it holds no {CONFIG}.")
    fields: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    name = str(fields.pop("model_type", ""))
    family = FAMILIES.get(name.removeprefix(_PREFIX))
    if family is None:
        raise ValueError(
            f"{folder} has `model_type` {name!r}; known are {', '.join(sorted(FAMILIES))}."
        )
    blocks = fields.pop("block_widths", None)
    fields.pop("auto_map", None)
    config = AutoConfig.for_model(family.model_type, **fields)
    if blocks is None:
        count, width = config.num_hidden_layers, getattr(config, family.mlp_width)
        return NativeShape(config, (width,) * count, (num_groups(config),) * count)
    for number, widths in enumerate(blocks):
        for site, width in widths.items():
            if site not in (*PARTS, HEADS, "mlp_mid") and width < config.hidden_size:
                raise ValueError(
                    f"Block {number} of {folder} has {width} of {config.hidden_size} entries of "
                    f"the residual stream at the site {site}; a server without the modelling file "
                    "cannot select entries. Learn masks with "
                    "`budget.sites: [mlp_mid]` and `budget.parts: true` instead."
                )
    return NativeShape(
        config,
        tuple(0 if widths.get("mlp") == 0 else widths["mlp_mid"] for widths in blocks),
        tuple(widths.get("attn", 1) * widths.get(HEADS, num_groups(config)) for widths in blocks),
    )
