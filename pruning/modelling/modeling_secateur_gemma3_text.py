"""A Gemma 3 whose blocks differ in width, as written by Secateur.

This file is in the folder of the model, beside `secateur_narrow.py` and `secateur_sandwich.py`,
and needs only torch and transformers.
"""

from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3DecoderLayer,
    Gemma3ForCausalLM,
    Gemma3TextModel,
)

from .secateur_narrow import BlockWidths, NarrowConfig, NarrowForCausalLM, NarrowModel
from .secateur_sandwich import SandwichBlock


class SecateurGemma3Config(NarrowConfig, Gemma3TextConfig):
    """Configuration of a Gemma 3 whose blocks differ in width; see `NarrowConfig`."""

    model_type = "secateur_gemma3_text"
    block_widths: BlockWidths = None


class SecateurGemma3DecoderLayer(SandwichBlock, Gemma3DecoderLayer):  # type: ignore[misc]
    """A narrow block of a Gemma 3."""


class SecateurGemma3Model(NarrowModel, Gemma3TextModel):
    """A Gemma 3 with narrow blocks, without its output head."""

    config_class = SecateurGemma3Config
    block_class = SecateurGemma3DecoderLayer


class SecateurGemma3ForCausalLM(NarrowForCausalLM, Gemma3ForCausalLM):
    """A Gemma 3 with narrow blocks."""

    config_class = SecateurGemma3Config
    model_class = SecateurGemma3Model
