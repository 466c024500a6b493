"""A Llama whose blocks differ in width, as written by Secateur.

This file is in the folder of the model, beside `secateur_narrow.py`, and needs only torch and
transformers.
"""

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

from .secateur_narrow import BlockWidths, NarrowConfig, NarrowForCausalLM, NarrowModel, PreNormBlock


class SecateurLlamaConfig(NarrowConfig, LlamaConfig):
    """Configuration of a Llama whose blocks differ in width; see `NarrowConfig`."""

    model_type = "secateur_llama"
    block_widths: BlockWidths = None


class SecateurLlamaDecoderLayer(PreNormBlock, LlamaDecoderLayer):  # type: ignore[misc]
    """A narrow block of a Llama."""


class SecateurLlamaModel(NarrowModel, LlamaModel):
    """A Llama with narrow blocks, without its output head."""

    config_class = SecateurLlamaConfig
    block_class = SecateurLlamaDecoderLayer


class SecateurLlamaForCausalLM(NarrowForCausalLM, LlamaForCausalLM):
    """A Llama with narrow blocks."""

    config_class = SecateurLlamaConfig
    model_class = SecateurLlamaModel
