"""Tiny models, tokenizers and model folders, made on the spot and the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 320

SENTENCES = (
    "The gardener takes the secateurs and cuts what does not carry.",
    "A tree that is pruned in winter bears more in summer, not less.",
    "Cut above a bud, at a slant, and the rain will run off the wood.",
    "What is removed was never the tree; what remains has to be enough.",
    "She counted the branches: seven thick ones, twelve thin ones, and a dead one.",
)


def tiny_llama_config(**overrides: Any) -> LlamaConfig:
    """Grouped queries (6 heads on 2), and an MLP width that nothing divides (37)."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**settings | overrides)


def tiny_llama(seed: int = 0, std: float = 0.2, **overrides: Any) -> LlamaForCausalLM:
    """A Llama in evaluation mode whose every parameter matters, see `randomise`.

    Args:
        seed: Seed of the weights; the global random state stays as it is.
        std: Standard deviation of all weights but those of norms, above 0.
        overrides: Fields of `LlamaConfig`, such as `tie_word_embeddings=True`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_llama_config(**overrides)).eval()
        randomise(model, std)
    return model


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {"intermediate_size": 37, "num_key_value_heads": 2}
_SLIDING = ["sliding_attention", "full_attention"] * 2
# The norm of a vector of width 1 is its sign, with a slope of up to 1 / sqrt(eps) at 0: with the
# usual 1e-6 the rounding of float32 would show.
_GEMMA = _GROUPED | {
    "head_dim": 6,
    "query_pre_attn_scalar": 9,
    "sliding_window": 5,
    "layer_types": _SLIDING,
    "rms_norm_eps": 1e-3,
}
_BASES: Mapping[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 5, "head_dim": 4},
    "qwen2": _GROUPED | {"use_sliding_window": True, "sliding_window": 5, "layer_types": _SLIDING},
    "qwen3": _GROUPED | {"head_dim": 10},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA,
    "opt": {"ffn_dim": 37},
    "phi": _GROUPED | {"partial_rotary_factor": 0.5},
}
_MHA, _TIED = {"num_key_value_heads": 6}, {"tie_word_embeddings": True}

# Family to variants to fields of its configuration: everything that its models differ in. A family
# of `secateur.pruning.families` that has no row here fails the contract.
VARIANTS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "llama": {
        "grouped": {},
        "multi-head, tied": _MHA | _TIED,
        "multi-query": {"num_key_value_heads": 1},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "head_dim": {"head_dim": 10},
        "rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    },
    "mistral": {
        "sliding": {},
        "full, multi-head, tied": {"sliding_window": None} | _MHA | _TIED,
    },
    "qwen2": {
        "some sliding": {},
        "full, multi-head, tied": {"use_sliding_window": False, "layer_types": None} | _MHA | _TIED,
    },
    "qwen3": {
        "head_dim": {},
        "biases, multi-head, tied": {"attention_bias": True, "head_dim": 4} | _MHA | _TIED,
        "some sliding": {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": _SLIDING,
        },
    },
    "gemma2": {
        "grouped": {},
        "multi-head, tied": _MHA | _TIED,
        "biases, no caps": {
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    },
    "gemma3_text": {
        "grouped": {},
        "multi-head, tied": _MHA | _TIED,
        "biases, caps": {"attention_bias": True, "final_logit_softcapping": 3.0},
    },
    "opt": {
        "tied": _TIED,
        "untied": {},
        "no biases": {"enable_bias": False},
        "other activation": {"activation_function": "gelu"},
    },
    "phi": {
        "multi-head": _MHA,
        "grouped, tied": _TIED,
        "norms of queries and keys": {"qk_layernorm": True},
    },
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of 4 blocks with an MLP width that nothing divides (37).

    Args:
        family: Its `model_type`.
        overrides: Fields of the configuration.
    """
    return AutoConfig.for_model(family, **_COMMON | _BASES[family] | overrides)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model in evaluation mode whose every parameter matters, see `randomise`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        randomise(model)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def randomise(model: PreTrainedModel, std: float = 0.2) -> None:
    """Draw all parameters anew, from the global random state.

    Norms and biases too: at their usual ones and zeros, a mistake in handling them would not show.

    Args:
        model: The model.
        std: Standard deviation of all parameters but those of norms, above 0.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=std)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with BOS in front, as Llama's; any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny_folder(path: Path, seed: int = 0, **overrides: Any) -> Path:
    """A model folder as `save_pretrained` writes it: a tiny Llama and its tokenizer."""
    tiny_llama(seed, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_family_folder(path: Path, family: str, seed: int = 0, **overrides: Any) -> Path:
    """A model folder as `save_pretrained` writes it, of any family and without a tokenizer."""
    tiny_model(family, seed, **overrides).save_pretrained(path)
    return path
