"""A Mistral whose blocks differ in width, as written by Secateur.

This file is in the folder of the model, beside `secateur_narrow.py`, and needs only torch and
transformers.
"""

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
)

from .secateur_narrow import BlockWidths, NarrowConfig, NarrowForCausalLM, NarrowModel, PreNormBlock


class SecateurMistralConfig(NarrowConfig, MistralConfig):
    """Configuration of a Mistral whose blocks differ in width; see `NarrowConfig`."""

    model_type = "secateur_mistral"
    block_widths: BlockWidths = None


class SecateurMistralDecoderLayer(PreNormBlock, MistralDecoderLayer):  # type: ignore[misc]
    """A narrow block of a Mistral."""


class SecateurMistralModel(NarrowModel, MistralModel):
    """A Mistral with narrow blocks, without its output head."""

    config_class = SecateurMistralConfig
    block_class = SecateurMistralDecoderLayer


class SecateurMistralForCausalLM(NarrowForCausalLM, MistralForCausalLM):
    """A Mistral with narrow blocks."""

    config_class = SecateurMistralConfig
    model_class = SecateurMistralModel
