"""Public models made small: their configurations as they are published, sizes aside.

What is kept is what differs between them and breaks readers: fields under their older names, scaled
rotary frequencies, heads that are wider than their share of the stream, ties that are said or not,
soft caps, windows, ids of special tokens that are lists or none, types of weights, and tokenizers
with fewer tokens than embeddings, or with one more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny import SENTENCES, randomise

VOCABULARY = 320
"""Embeddings of every model."""


@dataclass(frozen=True)
class Words:
    """A tokenizer.

    Args:
        front: Special tokens that come first.
        back: Special tokens that come behind all others.
        bos: The one in front of a text; None if there is none.
        eos: The one behind a text.
        pad: The one that fills batches; None if there is none.
        adds_bos: Whether encoding puts `bos` in front.
        count: Number of tokens in all.
    """

    front: tuple[str, ...]
    back: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str | None = None
    adds_bos: bool = True
    count: int = VOCABULARY

    def make(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE of that many tokens."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.count - len(self.back),
            special_tokens=list(self.front),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(SENTENCES, trainer)
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in self.back])
        assert tokenizer.get_vocab_size() == self.count
        if self.adds_bos and self.bos is not None:
            number = tokenizer.token_to_id(self.bos)
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, number)]
            )
        names = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        given = {name: text for name, text in names.items() if text is not None}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


@dataclass(frozen=True)
class PublicModel:
    """A model as it is published.

    Args:
        config: Its config.json, with small sizes and no more than 320 embeddings.
        words: Its tokenizer.
        generation: Its generation_config.json, if it has one.
    """

    config: Mapping[str, Any]
    words: Words
    generation: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Make the model folder."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            randomise(model)
        model.to(getattr(torch, self.config["torch_dtype"])).save_pretrained(folder)
        self.words.make().save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        (folder / "generation_config.json").unlink(missing_ok=True)
        if self.generation:
            text = json.dumps(self.generation)
            (folder / "generation_config.json").write_text(text, encoding="utf-8")
        return folder


_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_LLAMA_3 = _LLAMA | {"bos_token_id": 315, "eos_token_id": [316, 318, 319], "rope_theta": 500000.0}
_ROPE_3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 112,
    "max_position_embeddings": 512,
    "model_type": "mistral",
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
_QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": 310,
    "eos_token_id": 312,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
_GEMMA = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
_GEMMA_3 = _GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 16,
    "intermediate_size": 96,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 16,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 8,
    "torch_dtype": "bfloat16",
}
_PHI = {
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "gelu_new",
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 512,
    "model_type": "phi",
    "num_hidden_layers": 4,
    "qk_layernorm": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.37.0",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}

_BEHIND = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|eom_id|>", "<|eot_id|>")
_WORDS_LLAMA_3 = Words((), _BEHIND, "<|begin_of_text|>", "<|eot_id|>")
_SENTENCEPIECE = ("<unk>", "<s>", "</s>")
_WORDS_MISTRAL = Words(_SENTENCEPIECE, (), "<s>", "</s>")
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WORDS_QWEN = Words((), _CHAT, None, "<|im_end|>", "<|endoftext|>", adds_bos=False, count=313)
_WORDS_GEMMA = Words(("<pad>", "<eos>", "<bos>", "<unk>"), (), "<bos>", "<eos>", "<pad>")
_WORDS_GEMMA_3 = Words(
    _WORDS_GEMMA.front, ("<image_soft_token>",), "<bos>", "<eos>", "<pad>", count=VOCABULARY + 1
)
_ONE = "<|endoftext|>"
_WORDS_PHI = Words((), (_ONE,), _ONE, _ONE, adds_bos=False, count=300)

PUBLIC_MODELS: Mapping[str, PublicModel] = {
    "Llama-3.1-8B": PublicModel(
        _LLAMA_3 | {"rope_scaling": _ROPE_3},
        _WORDS_LLAMA_3,
        {"bos_token_id": 315, "do_sample": True, "eos_token_id": [316, 318, 319],
         "temperature": 0.6, "top_p": 0.9},
    ),
    "Llama-3.2-1B": PublicModel(
        _LLAMA_3
        | {"head_dim": 4, "rope_scaling": _ROPE_3 | {"factor": 32.0}, "tie_word_embeddings": True},
        _WORDS_LLAMA_3,
    ),
    "Mistral-7B-v0.3": PublicModel(
        _MISTRAL, _WORDS_MISTRAL, {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    ),
    "Mistral-Nemo": PublicModel(
        _MISTRAL | {"hidden_size": 40, "head_dim": 4}, _WORDS_MISTRAL
    ),
    "Qwen2.5-0.5B": PublicModel(
        _QWEN
        | {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 28, "intermediate_size": 76,
           "max_window_layers": 4, "model_type": "qwen2", "num_attention_heads": 14,
           "num_key_value_heads": 2, "sliding_window": 512, "use_mrope": False},
        _WORDS_QWEN,
        {"bos_token_id": 310, "eos_token_id": [312, 310], "pad_token_id": 310,
         "repetition_penalty": 1.1, "do_sample": True, "top_k": 20},
    ),
    "Qwen3-0.6B": PublicModel(
        _QWEN
        | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 8,
           "hidden_size": 32, "intermediate_size": 96, "max_window_layers": 4,
           "model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 4,
           "rope_scaling": None, "sliding_window": None},
        _WORDS_QWEN,
    ),
    "Gemma-2-2b": PublicModel(
        _GEMMA
        | {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0,
           "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 8,
           "hidden_act": "gelu_pytorch_tanh", "hidden_size": 36, "intermediate_size": 72,
           "model_type": "gemma2", "num_attention_heads": 4, "num_hidden_layers": 4,
           "num_key_value_heads": 2, "query_pre_attn_scalar": 8, "rope_theta": 10000.0,
           "sliding_window": 8, "torch_dtype": "float32"},
        _WORDS_GEMMA,
    ),
    "Gemma-3-1b": PublicModel(
        _GEMMA_3 | {"hidden_size": 36, "num_hidden_layers": 7, "sliding_window_pattern": 6},
        _WORDS_GEMMA_3,
        {"cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 106],
         "pad_token_id": 0, "top_k": 64, "top_p": 0.95},
    ),
    "Gemma-3-270m": PublicModel(
        _GEMMA_3
        | {"_sliding_window_pattern": 6, "hidden_size": 40, "num_hidden_layers": 7,
           "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
           "eos_token_id": 1, "use_bidirectional_attention": False},
        _WORDS_GEMMA_3,
    ),
    "Phi-1.5": PublicModel(
        _PHI
        | {"bos_token_id": None, "eos_token_id": None, "hidden_size": 32, "intermediate_size": 128,
           "num_attention_heads": 4, "num_key_value_heads": None, "partial_rotary_factor": 0.5,
           "resid_pdrop": 0.0},
        _WORDS_PHI,
        {"_from_model_config": True},
    ),
    "Phi-2": PublicModel(
        _PHI
        | {"bos_token_id": 299, "eos_token_id": 299, "hidden_size": 40, "intermediate_size": 160,
           "num_attention_heads": 4, "num_key_value_heads": 4, "partial_rotary_factor": 0.4,
           "resid_pdrop": 0.1},
        _WORDS_PHI,
        {"bos_token_id": 299, "eos_token_id": 299},
    ),
    "OPT-125m": PublicModel(
        {
            "_name_or_path": "facebook/opt-125m", "_remove_final_layer_norm": False,
            "activation_dropout": 0.0, "activation_function": "relu",
            "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
            "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 128,
            "hidden_size": 32, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 512,
            "model_type": "opt", "num_attention_heads": 4, "num_hidden_layers": 4,
            "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16",
            "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": VOCABULARY,
            "word_embed_proj_dim": 32,
        },
        Words(("<s>", "<pad>", "</s>", "<unk>"), (), "</s>", "</s>", "<pad>", count=313),
    ),
    "TinyLlama": PublicModel(
        _LLAMA | {"bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0},
        Words(_SENTENCEPIECE, ("[PAD]",), "<s>", "</s>", "[PAD]", count=VOCABULARY + 1),
    ),
    "SmolLM2-135M": PublicModel(
        _LLAMA
        | {"bos_token_id": 1, "eos_token_id": 2, "hidden_size": 36, "intermediate_size": 96,
           "is_llama_config": True, "num_attention_heads": 9, "num_key_value_heads": 3,
           "pad_token_id": 2, "rope_interleaved": False, "rope_theta": 100000,
           "tie_word_embeddings": True},
        Words(_CHAT, (), "<|im_start|>", "<|im_end|>", "<|im_end|>", adds_bos=False),
    ),
}  # fmt: skip
