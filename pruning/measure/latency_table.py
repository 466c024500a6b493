"""Tables of measured times, from which the time of a model of any widths is added up.

The time of a forward pass is that of embeddings and output head, plus that of every attention and
every MLP, each a sum of a base, which includes the floor that no width changes, and increments:

    attention(i, h, o) = (attn_in[i] + attn_out[o]) attn_heads[h] / attn_heads[all]
    MLP(i, m, o) = up[i, m] + down[m, o]

h groups of heads take a fraction of the time of all, the same at every width. A removed attention
or MLP takes no time. Sources: additive tables follow ZipLM (arXiv 2302.04089), HALP (arXiv
2110.10811) and Puzzle (arXiv 2411.19146); here they are two-dimensional, since every site of a
block has a width of its own.

Legend: G = widths of a grid, K = kinds of attention, B = blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.heads import HEADS, fields_of_heads, head_dim, num_groups
from secateur.pruning.measure.latency_curves import Curves
from secateur.pruning.modelling import stock_type
from secateur.pruning.sites import Site, find_sites

PHASES = ("prefill", "decode")
ROLES = ("attn_in", "attn_out", "mlp_in", "mlp_mid", "mlp_out")
LEAST_POINTS = 4
"""Widths of a site that a table needs: with fewer, times in between are guesses."""

_FORMAT = "secateur latency table 1"
_AGAIN = "measure it again with `python -m secateur latency`"


@dataclass(frozen=True)
class Phase:
    """Times of one phase: a prefill, or one decoding step. All in seconds, medians.

    Args:
        rest: Embeddings, last norm and output head.
        attn_in: Kind of attention to its times by the width of its input, at the least output.
        attn_out: Kind of attention to what wider outputs add.
        attn_heads: Kind of attention to its times by the number of groups of heads, at full input
            and output; empty if there is one group, or the table was measured before these were.
        up: Times of the MLP by the widths of its input and its middle, at the least output.
        down: What wider outputs of the MLP add, by the widths of its middle and its output.
        spread: Median over all measurements of (longest - shortest) / median of the rounds.
        factor: Time of whole models over the sum of their parts.
        checks: The same for every model that was measured whole, over `factor`.
    """

    rest: float
    attn_in: Mapping[str, Sequence[float]]
    attn_out: Mapping[str, Sequence[float]]
    up: Sequence[Sequence[float]]
    down: Sequence[Sequence[float]]
    spread: float
    factor: float
    checks: Sequence[float]
    attn_heads: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of the parts of a model.

    Args:
        shape: What the times depend on beside the widths, see `shape_of`.
        device: Type of the torch device, such as `cpu`.
        machine: See `machine_name`.
        dtype: Torch type of the weights, such as `bfloat16`.
        clock: `wall`, or `cpu` for processor time.
        prompt_tokens: Tokens of a prefill.
        new_tokens: Decoded tokens behind it.
        batch_size: Sequences.
        multiple: Measured widths are multiples of it, or full.
        grid: Site to its measured widths, rising; the last one is the full width.
        phases: Phase to its times.
    """

    shape: Mapping[str, Any]
    device: str
    machine: str
    dtype: str
    clock: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    multiple: int
    grid: Mapping[str, Sequence[int]]
    phases: Mapping[str, Phase]

    @property
    def measured_on(self) -> str:
        """Machine, threads and type of the weights in one line."""
        return f"{self.machine}, {self.dtype}"

    @property
    def hash(self) -> str:
        """Checksum of the contents, 12 hex digits."""
        text = json.dumps(self._content(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def save(self, path: Path) -> None:
        """Write the table as JSON, with its checksum."""
        content = {"format": _FORMAT, "hash": self.hash, **self._content()}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _content(self) -> dict[str, Any]:
        content = asdict(self)
        for phase in content["phases"].values():
            if not phase["attn_heads"]:  # as in tables from before there were times of heads
                del phase["attn_heads"]
        return content

    def check_model(self, config: PreTrainedConfig, shown: str) -> None:
        """Refuse a model of another shape; it may have fewer heads if their times were measured.

        Args:
            config: Configuration of the model.
            shown: Name of the table in messages.

        Raises:
            ValueError: The shape differs.
        """
        found = shape_of(config)
        if HEADS in self.grid:
            found |= fields_of_heads(config, int(self.grid[HEADS][-1]))
        elif HEADS in family_of(config).gates:
            raise ValueError(
                f"{shown} has no times for fewer heads, and blocks of this model have fewer; "
                f"{_AGAIN}."
            )
        for name in {**self.shape, **found}:
            if (own := self.shape.get(name)) != (other := found.get(name)):
                raise ValueError(
                    f"{shown} was measured for another model: `{name}` is {own} there and {other} "
                    f"here; {_AGAIN} and this model."
                )

    def check_sizes(self, sites: Sequence[Site], shown: str) -> None:
        """Refuse a base whose sites do not have the full widths of the table.

        Raises:
            ValueError: A site has another size.
        """
        for site in sites:
            if not site.is_part and site.size != (full := self.grid[site.name][-1]):
                raise ValueError(
                    f"{shown} was measured for another model: `{site.name}` has {full} entries "
                    f"there, and {site.size} in block {site.block} here; {_AGAIN} and this model."
                )

    def curves(self, weights: Mapping[str, float], monotone: bool = False) -> Curves:
        """Times of the parts in a mix of phases.

        Args:
            weights: Phase to the number of its passes in the mix, 0 or more.
            monotone: Take, for every width, the least time of it and all wider ones: a site may
                stay wider at no cost.
        """

        def mixed(values: Mapping[str, Any]) -> Tensor:
            tables = [
                weight * self.phases[name].factor * torch.tensor(values[name], dtype=torch.float64)
                for name, weight in weights.items()
            ]
            table = torch.stack(tables).sum(0)
            if monotone:
                for axis in range(table.dim()):
                    table = table.flip(axis).cummin(axis).values.flip(axis)
            return table

        def parts(name: str) -> dict[str, Any]:
            return {phase: getattr(own, name) for phase, own in self.phases.items()}

        kinds = sorted(self.phases["prefill"].attn_in)
        return Curves(
            grid={role: torch.tensor(widths).double() for role, widths in self.grid.items()},
            kinds=kinds,
            rest=float(mixed(parts("rest"))),
            attn_in=[
                mixed({p: own[kind] for p, own in parts("attn_in").items()}) for kind in kinds
            ],
            attn_out=[
                mixed({p: own[kind] for p, own in parts("attn_out").items()}) for kind in kinds
            ],
            attn_heads=[
                mixed({p: own[kind] for p, own in parts("attn_heads").items()})
                for kind in (kinds if HEADS in self.grid else ())
            ],
            up=mixed(parts("up")),
            down=mixed(parts("down")),
        )

    def seconds(self, model: PreTrainedModel, phase: str) -> float:
        """Predict one pass of a model, which may be narrow, in seconds.

        Args:
            model: A model of the shape of the table, of any widths and number of blocks; it may
                live on the meta device.
            phase: One of `PHASES`.
        """
        curves, family = self.curves({phase: 1.0}), family_of(model.config)
        widths: list[dict[str, int]] = [{} for _ in blocks_of(model, family)]
        for site in find_sites(model, family):
            widths[site.block][site.name] = site.size
        total = curves.rest
        for block, own in enumerate(widths):
            sizes = {name: torch.tensor(float(size)) for name, size in own.items()}
            if "attn_in" in own:
                kind = torch.tensor(curves.kinds.index(kind_of(model.config, block)))
                heads = None
                if HEADS in self.grid:
                    heads = sizes.get(HEADS, torch.tensor(float(num_groups(model.config))))
                seconds = curves.attention(kind, sizes["attn_in"], sizes["attn_out"], heads)
                total += float(seconds)
            if "mlp_in" in own:
                total += float(curves.mlp(sizes["mlp_in"], sizes["mlp_mid"], sizes["mlp_out"]))
        return total


def grid_of(size: int, multiple: int, points: int) -> list[int]:
    """Widths to measure: all multiples and the size, or some of them, dense where they are narrow.

    The last one below the full width is always among them: a full site selects nothing, so that
    its time does not continue that of narrower ones.

    Args:
        size: Full width of the site, 1 or more.
        multiple: Widths are multiples of it.
        points: Number of widths at most, 4 or more.
    """
    narrow = [*range(multiple, size, multiple)] or [max(1, size // 2)]
    last, chosen = len(narrow) - 1, min(points - 1, len(narrow))
    places = [0]
    for point in range(1, chosen):
        spread = round(last * (point / (chosen - 1)) ** 1.5)
        # No width twice, and room for those that follow.
        places.append(min(max(spread, places[-1] + 1), last - (chosen - 1 - point)))
    return sorted({*(narrow[place] for place in places), size})


def kind_of(config: Any, block: int) -> str:
    """The kind of attention of a block: what the configuration calls the type of its layer."""
    types = getattr(config, "layer_types", None)
    return str(types[block]) if types else "attention"


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What the time of a model depends on, beside its widths and the number of its blocks."""
    found: Any = config
    sizes = {
        "model_type": stock_type(found.model_type),
        "hidden_size": found.hidden_size,
        "num_attention_heads": found.num_attention_heads,
        "num_key_value_heads": num_groups(config),
        "head_dim": head_dim(config),
        "vocab_size": found.vocab_size,
        "sliding_window": getattr(found, "sliding_window", None),
    }
    return sizes | {
        "kinds": sorted({kind_of(config, block) for block in range(found.num_hidden_layers)})
    }


def machine_name(device: torch.device | str) -> str:
    """The machine that computes: the name of the GPU, or of the processor and its threads."""
    if torch.device(device).type == "cuda":
        there = torch.cuda.is_available()
        return str(torch.cuda.get_device_name(device)) if there else "a machine without CUDA"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(named, platform.processor() or platform.machine())
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def read_table(path: str | Path, setting: str = "table") -> LatencyTable:
    """Read a table.

    Args:
        path: File that `python -m secateur latency` wrote.
        setting: Name of the setting in messages.

    Raises:
        ValueError: There is no such file, or it is damaged, of another program, or too coarse.
    """
    shown = f"`{setting}` {path}"
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{shown} cannot be read ({error.strerror}); make it with `python -m secateur latency "
            "MODEL --output FILE`."
        ) from error
    except ValueError as error:
        raise ValueError(f"{shown} is damaged, it is no JSON; {_AGAIN}.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{shown} is no table of times; {_AGAIN}.")
    said = content.pop("hash", None)
    del content["format"]
    try:
        phases = {name: Phase(**own) for name, own in content.pop("phases").items()}
        table = LatencyTable(**content, phases=phases)
        sound = table.hash == said and _is_sound(table)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{shown} is damaged, entries are missing; {_AGAIN}.") from error
    if not sound:
        raise ValueError(f"{shown} is damaged or was changed by hand; {_AGAIN}.")
    for role in ROLES:
        if (points := len(table.grid[role])) < min(LEAST_POINTS, table.grid[role][-1]):
            raise ValueError(
                f"{shown} is too coarse: it has {points} widths of `{role}`, and needs "
                f"{LEAST_POINTS}; {_AGAIN} and more `--points`."
            )
    return table


def _is_sound(table: LatencyTable) -> bool:
    """Test that all figures are there, finite, and not negative."""
    size = {role: len(table.grid[role]) for role in ROLES}
    if any(len(g) < 2 or g[0] < 1 for g in table.grid.values()):
        return False
    if any(low >= high for grid in table.grid.values() for low, high in pairwise(grid)):
        return False
    for name in PHASES:
        own = table.phases[name]
        shapes = [(own.up, (size["mlp_in"], size["mlp_mid"]))]
        shapes += [(own.down, (size["mlp_mid"], size["mlp_out"]))]
        lines = [(line, size["attn_in"]) for line in own.attn_in.values()]
        lines += [(line, size["attn_out"]) for line in own.attn_out.values()]
        lines += [(line, len(table.grid.get(HEADS, ()))) for line in own.attn_heads.values()]
        if not own.attn_in or own.attn_in.keys() != own.attn_out.keys():
            return False
        if own.attn_heads.keys() != (own.attn_in.keys() if HEADS in table.grid else {*()}):
            return False
        if any(line[-1] <= 0 for line in own.attn_heads.values()):
            return False
        lines += [(row, columns) for plane, (_, columns) in shapes for row in plane]
        if any(len(plane) != rows for plane, (rows, _) in shapes):
            return False
        if any(len(line) != columns for line, columns in lines):
            return False
        figures = [own.rest, own.factor, *(value for line, _ in lines for value in line)]
        if not all(math.isfinite(value) and value >= 0 for value in figures):
            return False
    return True
