"""Every family and every kind of plan, as tiny models that all servers have kernels for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from secateur.pruning.export.nemotron_nas import write_nemotron_nas
from secateur.pruning.export.rewrite import prune_blocks, prune_checkpoint
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.plan import Plan
from tests.pruning.export.plans import heads_plan, native_plan, uneven_plan, uniform_plan
from tests.tiny import tiny_family_folder, tiny_tokenizer

POSITIONS = 128
# vLLM has kernels for heads of 32 and more. 6 blocks, of which 2 can go without breaking the
# order of Gemma's kinds of attention.
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 6,
    "max_position_embeddings": POSITIONS,
}
_FILLED = {"hidden_size": 128}  # by the heads, as the configuration of the family demands
_WINDOWS = ["sliding_attention", "full_attention"] * 3
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": _FILLED | {"use_sliding_window": False, "layer_types": None},
    "qwen3": {},
    "gemma2": {"tie_word_embeddings": True, "layer_types": _WINDOWS, "sliding_window": 32},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "sliding_window": 32,
    },
    "opt": _FILLED | {"ffn_dim": 37},
    "phi": _FILLED,
}

Make = Callable[[Path, Path], None]


def half_of_heads(folder: Path, every: int) -> Plan:
    """A plan that keeps half of the heads in every block, or in every second one only."""
    config = BaseModel(folder).skeleton().config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    blocks = range(config.num_hidden_layers)
    return heads_plan(folder, [groups if block % every else groups // 2 for block in blocks])


PLANS: Mapping[str, Make] = {
    "dense": lambda base, out: None,
    "widths per block": lambda base, out: prune_checkpoint(base, uneven_plan(base), out),
    "uniform": lambda base, out: prune_checkpoint(base, uniform_plan(base, 0.9), out),
    "depth": lambda base, out: prune_blocks(base, out, remove=[0, 1]),
    "half of the heads": lambda base, out: prune_checkpoint(base, half_of_heads(base, 1), out),
    "heads per block": lambda base, out: prune_checkpoint(base, half_of_heads(base, 2), out),
    "MLP widths": lambda base, out: prune_checkpoint(base, native_plan(base), out),
    "no MLP in block 1": lambda base, out: prune_checkpoint(
        base, native_plan(base, [(1, "mlp")]), out
    ),
    "no attention in block 2": lambda base, out: prune_checkpoint(
        base, native_plan(base, [(2, "attn")]), out
    ),
}

# What only the form that vLLM has built in has to be tried on: family, sizes, plan.
MORE: Mapping[str, tuple[str, dict[str, Any], Make]] = {
    "llama, no attention in block 0": (
        "llama",
        {},
        lambda base, out: prune_checkpoint(base, native_plan(base, [(0, "attn")]), out),
    ),
    "llama, multiples of 256": (
        "llama",
        {"intermediate_size": 768},
        lambda base, out: prune_checkpoint(base, native_plan(base, widths=(256, 512, 256)), out),
    ),
    "mistral, a sliding window": (
        "mistral",
        {"sliding_window": 32},
        lambda base, out: prune_checkpoint(base, native_plan(base), out),
    ),
    "qwen2, sliding windows in some blocks": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 32,
            "layer_types": [*_WINDOWS[:4], "full_attention", "full_attention"],
        },
        lambda base, out: prune_checkpoint(base, native_plan(base), out),
    ),
}
BUILT_IN = [
    f"{family}, {kind}"
    for family in ("llama", "mistral", "qwen2")
    for kind in ("MLP widths", "no MLP in block 1", "no attention in block 2")
] + [*MORE]
"""Models that are written in the form that vLLM has built in as well."""


def built_in(name: str) -> str:
    """The name of a model in that form."""
    return f"{name}, nemotron-nas"


def make_folders(place: Path) -> dict[str, Path]:
    """All models, by `family, plan`, and with it the form that vLLM has built in."""
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
    for number, (name, (family, sizes, make)) in enumerate(MORE.items()):
        base = tiny_family_folder(place / f"base-{number}", family, **_SIZES | sizes)
        tiny_tokenizer().save_pretrained(base)
        folders[name] = place / f"more-{number}"
        make(base, folders[name])
    for number, name in enumerate(BUILT_IN):
        write_nemotron_nas(folders[name], place / f"built-in-{number}")
        folders[built_in(name)] = place / f"built-in-{number}"
    return folders
