"""Every family and every kind of plan, as tiny models that all servers have kernels for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from secateur.pruning.depth.rewrite_blocks import prune_blocks
from secateur.pruning.export.rewrite import prune_checkpoint
from tests.pruning.export.plans import native_plan, uneven_plan, uniform_plan
from tests.tiny import tiny_family_folder, tiny_tokenizer

POSITIONS = 128
# vLLM has kernels for heads of 32 and more. 6 blocks, of which 2 can go without breaking the
# order of Gemma's kinds of attention.
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_hidden_layers": 6,
    "max_position_embeddings": POSITIONS,
}
_WINDOWS = ["sliding_attention", "full_attention"] * 3
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": None},
    "qwen3": {},
    "gemma2": {"tie_word_embeddings": True, "layer_types": _WINDOWS, "sliding_window": 32},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "sliding_window": 32,
    },
    "opt": {"ffn_dim": 37},
    "phi": {},
}

Make = Callable[[Path, Path], None]
PLANS: Mapping[str, Make] = {
    "dense": lambda base, out: None,
    "widths per block": lambda base, out: prune_checkpoint(base, uneven_plan(base), out),
    "uniform": lambda base, out: prune_checkpoint(base, uniform_plan(base, 0.9), out),
    "depth": lambda base, out: prune_blocks(base, out, remove=[0, 1]),
    "MLP widths": lambda base, out: prune_checkpoint(base, native_plan(base), out),
    "no MLP in block 1": lambda base, out: prune_checkpoint(
        base, native_plan(base, [(1, "mlp")]), out
    ),
    "no attention in block 2": lambda base, out: prune_checkpoint(
        base, native_plan(base, [(2, "attn")]), out
    ),
}


def make_folders(place: Path) -> dict[str, Path]:
    """All models, by `family, plan`."""
    folders = {}
    for family, overrides in FAMILIES.items():
        sizes = _SIZES | overrides
        if family in ("opt", "phi"):
            del sizes["head_dim"], sizes["num_key_value_heads"]
        base = tiny_family_folder(place / family, family, **sizes)
        tiny_tokenizer().save_pretrained(base)
        for number, (kind, make) in enumerate(PLANS.items()):
            out = base if kind == "dense" else place / f"{family}-{number}"
            make(base, out)
            folders[f"{family}, {kind}"] = out
    return folders
