"""Latency tables that are made up: by formulas, for models of `tests.tiny`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from secateur.pruning.families import family_of, skeleton
from secateur.pruning.heads import HEADS, num_groups
from secateur.pruning.measure.latency_table import (
    ROLES,
    LatencyTable,
    Phase,
    grid_of,
    kind_of,
    machine_name,
    shape_of,
)
from secateur.pruning.sites import find_sites

Line = Callable[[int], float]
Plane = Callable[[int, int], float]


def made_table(
    config: Any,
    attn_in: Line,
    attn_out: Line,
    up: Plane,
    down: Plane,
    rest: float = 0.0,
    points: int = 8,
    attn_heads: Line | None = None,
    **fields: Any,
) -> LatencyTable:
    """A table of a formula; a decoding step takes half of the time of a prefill."""
    sizes = {s.name: s.size for s in find_sites(skeleton(config), family_of(config))}
    grid = {role: grid_of(sizes[role], 1, points) for role in ROLES}
    kinds = {kind_of(config, block) for block in range(config.num_hidden_layers)}
    if attn_heads is not None:
        grid[HEADS] = grid_of(num_groups(config), 1, points)

    def phase(scale: float) -> Phase:
        return Phase(
            rest=scale * rest,
            attn_in={kind: [scale * attn_in(w) for w in grid["attn_in"]] for kind in kinds},
            attn_out={kind: [scale * attn_out(w) for w in grid["attn_out"]] for kind in kinds},
            up=[[scale * up(w, m) for m in grid["mlp_mid"]] for w in grid["mlp_in"]],
            down=[[scale * down(m, w) for w in grid["mlp_out"]] for m in grid["mlp_mid"]],
            spread=0.01,
            factor=1.0,
            checks=[1.0],
            attn_heads={kind: [scale * attn_heads(w) for w in grid[HEADS]] for kind in kinds}
            if attn_heads is not None
            else {},
        )

    settings: dict[str, Any] = {
        "shape": shape_of(config),
        "device": "cpu",
        "machine": machine_name("cpu"),
        "dtype": str(skeleton(config).dtype).removeprefix("torch."),
        "clock": "wall",
        "prompt_tokens": 16,
        "new_tokens": 8,
        "batch_size": 1,
        "multiple": 1,
        "grid": grid,
        "phases": {"prefill": phase(1.0), "decode": phase(0.5)},
    }
    return LatencyTable(**settings | fields)


def flops_table(config: Any, **fields: Any) -> LatencyTable:
    """A Llama whose prefill takes as many seconds as its blocks have FLOPs per token."""
    query = config.num_attention_heads * config.head_dim
    keys_too = query + 2 * config.num_key_value_heads * config.head_dim
    return made_table(
        config,
        attn_in=lambda w: 2.0 * w * keys_too,
        attn_out=lambda w: 2.0 * w * query,
        up=lambda w, m: 4.0 * w * m,
        down=lambda m, w: 2.0 * m * w,
        **fields,
    )


def noisy_table(config: Any, seed: int = 0, **fields: Any) -> LatencyTable:
    """Times that mostly rise with the widths, but not always."""
    draw = random.Random(seed)
    return made_table(
        config,
        attn_in=lambda w: 5 + 0.1 * w + draw.random(),
        attn_out=lambda w: 0.1 * w + draw.random(),
        up=lambda w, m: 4 + 0.01 * w * m + draw.random(),
        down=lambda m, w: 0.005 * m * w + draw.random(),
        rest=3.0,
        **fields,
    )


def stepped_table(config: Any, tread: int = 8) -> LatencyTable:
    """Times that rise in steps, where widths pass a multiple of `tread`."""

    def steps(width: int) -> float:
        return float(-(-width // tread))

    return made_table(
        config,
        attn_in=steps,
        attn_out=steps,
        up=lambda w, m: 0.5 * steps(w) * steps(m),
        down=lambda m, w: 0.5 * steps(m) * steps(w),
        rest=1.0,
        points=64,  # all widths
    )


def seconds_by_hand(table: LatencyTable, phase: str, widths: dict[str, int]) -> float:
    """Time of one block at widths of the grid."""
    own = table.phases[phase]
    place = {role: table.grid[role].index(width) for role, width in widths.items()}
    (attn_in,), (attn_out,) = own.attn_in.values(), own.attn_out.values()
    return (
        attn_in[place["attn_in"]]
        + attn_out[place["attn_out"]]
        + own.up[place["mlp_in"]][place["mlp_mid"]]
        + own.down[place["mlp_mid"]][place["mlp_out"]]
    )


def random_scores(count: int, seed: int = 0) -> torch.Tensor:
    """Scores of all gates."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
