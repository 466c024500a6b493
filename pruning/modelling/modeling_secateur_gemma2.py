"""A Gemma 2 whose blocks differ in width, as written by Secateur.

This file is in the folder of the model, beside `secateur_narrow.py` and `secateur_sandwich.py`,
and needs only torch and transformers.
"""

from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2DecoderLayer,
    Gemma2ForCausalLM,
    Gemma2Model,
)

from .secateur_narrow import BlockWidths, NarrowConfig, NarrowForCausalLM, NarrowModel
from .secateur_sandwich import SandwichBlock


class SecateurGemma2Config(NarrowConfig, Gemma2Config):
    """Configuration of a Gemma 2 whose blocks differ in width; see `NarrowConfig`."""

    model_type = "secateur_gemma2"
    block_widths: BlockWidths = None


class SecateurGemma2DecoderLayer(SandwichBlock, Gemma2DecoderLayer):  # type: ignore[misc]
    """A narrow block of a Gemma 2."""


class SecateurGemma2Model(NarrowModel, Gemma2Model):
    """A Gemma 2 with narrow blocks, without its output head."""

    config_class = SecateurGemma2Config
    block_class = SecateurGemma2DecoderLayer


class SecateurGemma2ForCausalLM(NarrowForCausalLM, Gemma2ForCausalLM):
    """A Gemma 2 with narrow blocks."""

    config_class = SecateurGemma2Config
    model_class = SecateurGemma2Model
