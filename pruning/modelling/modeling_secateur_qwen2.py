"""A Qwen2 whose blocks differ in width, as written by Secateur.

This file is in the folder of the model, beside `secateur_narrow.py`, and needs only torch and
transformers.
"""

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model

from .secateur_narrow import BlockWidths, NarrowConfig, NarrowForCausalLM, NarrowModel, PreNormBlock


class SecateurQwen2Config(NarrowConfig, Qwen2Config):
    """Configuration of a Qwen2 whose blocks differ in width; see `NarrowConfig`."""

    model_type = "secateur_qwen2"
    block_widths: BlockWidths = None


class SecateurQwen2DecoderLayer(PreNormBlock, Qwen2DecoderLayer):  # type: ignore[misc]
    """A narrow block of a Qwen2."""


class SecateurQwen2Model(NarrowModel, Qwen2Model):
    """A Qwen2 with narrow blocks, without its output head."""

    config_class = SecateurQwen2Config
    block_class = SecateurQwen2DecoderLayer


class SecateurQwen2ForCausalLM(NarrowForCausalLM, Qwen2ForCausalLM):
    """A Qwen2 with narrow blocks."""

    config_class = SecateurQwen2Config
    model_class = SecateurQwen2Model
