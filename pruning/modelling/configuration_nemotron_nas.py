"""The configuration of a Llama whose blocks differ, in a format built into vLLM.

This file is in the folder of such a model and needs only transformers. The model class is the
server's own `DeciLMForCausalLM`; transformers has no configuration of this type.
"""

# mypy: allow-untyped-calls
# (transformers is annotated in part)

from typing import Any

from transformers import LlamaConfig


class Fields(dict[str, Any]):
    """A dictionary whose entries are also attributes, as the server reads them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class NemotronNasConfig(LlamaConfig):
    """Configuration of a Llama whose blocks differ.

    Args:
        block_configs: One mapping per block. `attention` has `no_op` and `n_heads_in_group`, the
            queries per key; `ffn` has `no_op` and `intermediate_size`, its width.
    """

    model_type = "nemotron-nas"
    block_configs: list[dict[str, dict[str, Any]]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.block_configs = [
            Fields({part: Fields(entries) for part, entries in block.items()})
            for block in self.block_configs or []
        ]
