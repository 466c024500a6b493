"""A Qwen3 whose blocks differ in width, as written by Secateur.

This file is in the folder of the model, beside `secateur_narrow.py`, and needs only torch and
transformers.
"""

from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model

from .secateur_narrow import BlockWidths, NarrowConfig, NarrowForCausalLM, NarrowModel, PreNormBlock


class SecateurQwen3Config(NarrowConfig, Qwen3Config):
    """Configuration of a Qwen3 whose blocks differ in width; see `NarrowConfig`."""

    model_type = "secateur_qwen3"
    block_widths: BlockWidths = None


class SecateurQwen3DecoderLayer(PreNormBlock, Qwen3DecoderLayer):  # type: ignore[misc]
    """A narrow block of a Qwen3."""


class SecateurQwen3Model(NarrowModel, Qwen3Model):
    """A Qwen3 with narrow blocks, without its output head."""

    config_class = SecateurQwen3Config
    block_class = SecateurQwen3DecoderLayer


class SecateurQwen3ForCausalLM(NarrowForCausalLM, Qwen3ForCausalLM):
    """A Qwen3 with narrow blocks."""

    config_class = SecateurQwen3Config
    model_class = SecateurQwen3Model
