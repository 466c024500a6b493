"""Tiny models, tokenizers and model folders, made on the spot and the same on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A Llama in evaluation mode whose every parameter matters.

    Norms and biases are drawn at random too: at their usual ones and zeros, a mistake in handling
    them would not show.

    Args:
        seed: Seed of the weights; the global random state stays as it is.
        overrides: Fields of `LlamaConfig`, such as `tie_word_embeddings=True`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_llama_config(**overrides)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.2)
    return model


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
