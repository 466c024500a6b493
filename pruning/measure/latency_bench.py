"""Times of the parts of a model at every width, measured with random weights.

Blocks of all widths are built in Secateur's own code, as in an export, and timed as a whole,
attention and MLP apart: norms, selections, cache and additions are in the times. All measurements
are repeated in rounds, in a new random order each, and medians are kept. Before a decoding step, as
many bytes are read as the blocks of the dense model hold: in a model, the weights of a block have
left the cache of the processor when it is called again.

Sources: see `secateur.pruning.measure.latency_table`.

Legend: B = sequences of the batch, T = tokens, W = kept entries.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig

from secateur.pruning.families import blocks_of, family_of, skeleton
from secateur.pruning.heads import HEADS, num_groups
from secateur.pruning.measure.latency_table import (
    LEAST_POINTS,
    PHASES,
    ROLES,
    LatencyTable,
    Phase,
    grid_of,
    kind_of,
    machine_name,
    shape_of,
)
from secateur.pruning.measure.speed import measure_speed, now
from secateur.pruning.modelling import config_class, narrow_type
from secateur.pruning.progress import tracked
from secateur.pruning.sites import fast_multiple, find_sites

_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
_MOST_WALKED = 1 << 28  # bytes, above most caches
_MOST_CALLS, _ENOUGH_SECONDS = 8, 0.02  # of one measurement in one round
_FEW_TOKENS = 64  # vocabulary of models whose blocks alone are timed

Widths = Mapping[str, int]


@dataclass(frozen=True)
class Measurement:
    """How times are measured.

    Args:
        prompt_tokens: Tokens of a prefill, 1 or more.
        new_tokens: Tokens decoded behind it, 2 or more; a step is timed at half of them.
        batch_size: Sequences, 1 or more.
        points: Widths per site at most, 4 or more; fewer are faster and less accurate.
        multiple: Measured widths are multiples of it, 1 or more; None means the one that a budget
            takes by itself.
        rounds: Times that everything is measured, 1 or more.
        models: Whole models that the sum of the parts is compared with, 1 or more.
        blocks: Blocks of such a model at most, 1 or more.
        cpu_time: Processor time instead of wall time; for one thread of a CPU.
        seed: Seed of widths, order and weights.

    Raises:
        ValueError: A setting is outside its range.
    """

    prompt_tokens: int = 512
    new_tokens: int = 128
    batch_size: int = 1
    points: int = 10
    multiple: int | None = None
    rounds: int = 3
    models: int = 4
    blocks: int = 4
    cpu_time: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"new_tokens": 2, "points": LEAST_POINTS, "seed": 0}
        for name, value in vars(self).items():
            if value is not None and value < least.get(name, name != "cpu_time"):
                raise ValueError(f"`{name}` must be {least.get(name, 1)} or more, got {value}.")

    @property
    def clock(self) -> Callable[[], float]:
        """The clock, in seconds."""
        return time.process_time if self.cpu_time else time.perf_counter


@dataclass(frozen=True)
class _Call:
    """Arguments of a block in a forward pass of its model.

    Args:
        arguments: Positional ones.
        named: Those with names, but the cache.
        cache: The cache before the pass, and its name.
    """

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    cache: tuple[str, Cache]

    def of_heads(self, groups: int) -> _Call:
        """The same with a cache of so many groups of heads."""
        name, fewer = copy.deepcopy(self.cache)
        layers: list[Any] = fewer.layers
        for layer in layers:
            if layer.is_initialized:
                layer.keys = layer.keys[:, :groups].contiguous()
                layer.values = layer.values[:, :groups].contiguous()
        return replace(self, cache=(name, fewer))

    def seconds(
        self, block: nn.Module, clock: Callable[[], float], device: torch.device, walked: Tensor
    ) -> float:
        """Time a block: the median of some calls after one that warms up, `walked` read before."""
        name, cache = self.cache
        times: list[float] = []
        while len(times) < 2 or (len(times) < _MOST_CALLS and sum(times) < _ENOUGH_SECONDS):
            own = copy.deepcopy(cache)
            walked.sum()
            begin = now(clock, device)
            block(*self.arguments, **self.named, **{name: own})
            times.append(now(clock, device) - begin)
        return median(times[1:])


class Bench:
    """The measurements of one model.

    Args:
        config: Configuration of the model.
        dtype: Type of the weights.
        device: Device that computes.
        how: How times are measured.
    """

    def __init__(
        self, config: Any, dtype: torch.dtype, device: torch.device, how: Measurement
    ) -> None:
        self.config, self.dtype, self.device, self.how = config, dtype, device, how
        model = skeleton(config)
        self.family = family_of(config)
        sizes = {site.name: site.size for site in find_sites(model, self.family)}
        self.multiple = how.multiple or fast_multiple(config.hidden_size)
        self.grid = {role: grid_of(sizes[role], self.multiple, how.points) for role in ROLES}
        self.least = {role: self.grid[role][0] for role in ROLES}
        if (groups := num_groups(config)) > 1:
            self.grid[HEADS] = grid_of(groups, 1, how.points)
        # A block of every kind of attention.
        blocks = range(config.num_hidden_layers)
        self.kinds = {kind_of(config, block): block for block in reversed(blocks)}
        held = sum(p.numel() for b in blocks_of(model, self.family) for p in b.parameters())
        walked = min(held * dtype.itemsize, _MOST_WALKED) // 4
        self.walked = {"prefill": torch.ones(1), "decode": torch.ones(walked)}
        self.walked = {phase: own.to(device) for phase, own in self.walked.items()}
        self.noise = torch.empty(0)

    def table(self) -> LatencyTable:
        """Measure everything."""
        rest = self._rest()
        pieces, spread = self._pieces()
        phases = {phase: self._phase(phase, rest[phase], pieces, spread[phase]) for phase in PHASES}
        for phase, times in self._whole(self._table_of(phases)).items():
            factor = median(times)
            fields = {"factor": factor, "checks": [value / factor for value in times]}
            phases[phase] = Phase(**(vars(phases[phase]) | fields))
        return self._table_of(phases)

    def _table_of(self, phases: Mapping[str, Phase]) -> LatencyTable:
        return LatencyTable(
            shape=shape_of(self.config),
            device=self.device.type,
            machine=machine_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            clock="cpu" if self.how.cpu_time else "wall",
            prompt_tokens=self.how.prompt_tokens,
            new_tokens=self.how.new_tokens,
            batch_size=self.how.batch_size,
            multiple=self.multiple,
            grid=self.grid,
            phases=dict(phases),
        )

    def _phase(
        self, phase: str, rest: float, pieces: Mapping[Any, Mapping[str, float]], spread: float
    ) -> Phase:
        """Bases and increments from the times of the pieces; noise makes no increment negative."""
        grid, least = self.grid, self.least

        def time_of(*key: str | int) -> float:
            return pieces[key][phase]

        first = list(least.values())
        return Phase(
            rest=rest,
            attn_in={
                kind: [time_of(kind, w, first[1]) for w in grid["attn_in"]] for kind in self.kinds
            },
            attn_out={
                kind: [
                    max(0.0, time_of(kind, first[0], w) - time_of(kind, first[0], first[1]))
                    for w in grid["attn_out"]
                ]
                for kind in self.kinds
            },
            attn_heads={
                kind: [time_of(*self._of_heads(kind, heads)) for heads in grid[HEADS]]
                for kind in (self.kinds if HEADS in grid else ())
            },
            up=[[time_of("mlp", w, m, first[4]) for m in grid["mlp_mid"]] for w in grid["mlp_in"]],
            down=[
                [
                    max(0.0, time_of("mlp", first[2], m, w) - time_of("mlp", first[2], m, first[4]))
                    for w in grid["mlp_out"]
                ]
                for m in grid["mlp_mid"]
            ],
            spread=spread,
            factor=1.0,
            checks=[],
        )

    def _of_heads(self, kind: str, heads: int) -> tuple[str, int, int, int]:
        """The key of an attention with some of its heads, and full input and output."""
        return kind, self.grid["attn_in"][-1], self.grid["attn_out"][-1], heads

    def _keys(self) -> list[tuple[Any, ...]]:
        """All pieces: kind of attention or `mlp`, widths in the order of `ROLES`, fewer heads."""
        grid, least = self.grid, self.least
        keys: dict[tuple[Any, ...], None] = {}
        for kind in self.kinds:
            keys |= {(kind, w, least["attn_out"]): None for w in grid["attn_in"]}
            keys |= {(kind, least["attn_in"], w): None for w in grid["attn_out"]}
            keys |= {self._of_heads(kind, heads): None for heads in grid.get(HEADS, ())}
        for middle in grid["mlp_mid"]:
            keys |= {("mlp", w, middle, least["mlp_out"]): None for w in grid["mlp_in"]}
            keys |= {("mlp", least["mlp_in"], middle, w): None for w in grid["mlp_out"]}
        return list(keys)

    def _pieces(self) -> tuple[dict[Any, dict[str, float]], dict[str, float]]:
        """Median seconds of every piece, and the median of their spreads, by phase."""
        places = {**{kind: place for place, kind in enumerate(self.kinds)}, "mlp": len(self.kinds)}
        # One attention of every kind, and an MLP.
        widths = [*({"mlp": 0} for _ in self.kinds), {"attn": 0}]
        of_base = [*self.kinds.values(), next(iter(self.kinds.values()))]
        host = self.narrow(widths, of_base, _FEW_TOKENS)
        calls = {phase: self._calls(host, phase) for phase in PHASES}
        keys, order = self._keys(), random.Random(self.how.seed)
        times: dict[Any, dict[str, list[float]]] = {
            key: {phase: [] for phase in PHASES} for key in keys
        }
        turns = [key for _ in range(self.how.rounds) for key in order.sample(keys, len(keys))]
        for key in tracked(turns, "Measuring blocks"):
            block = self._piece(host, places[key[0]], key)
            for phase in PHASES:
                call = calls[phase][places[key[0]]]
                if key[0] != "mlp" and len(key) > 3:
                    call = call.of_heads(key[3])
                found = call.seconds(block, self.how.clock, self.device, self.walked[phase])
                times[key][phase].append(found)
        medians = {key: {p: median(own[p]) for p in PHASES} for key, own in times.items()}
        spread = {
            phase: median(
                (max(own[phase]) - min(own[phase])) / medians[key][phase]
                for key, own in times.items()
            )
            for phase in PHASES
        }
        return medians, spread

    def _piece(self, host: Any, place: int, key: tuple[Any, ...]) -> nn.Module:
        """A block of one part, of the widths of a key."""
        config = copy.deepcopy(host.config)
        roles, gone = (ROLES[2:], "attn") if key[0] == "mlp" else ((*ROLES[:2], HEADS), "mlp")
        widths = self._shown(dict(zip(roles, key[1:], strict=False)))
        config.block_widths[place] = {gone: 0, **widths}
        with torch.device("meta"):
            block: nn.Module = type(blocks_of(host, self.family)[place])(config, place)
        block = block.to(self.dtype).to_empty(device=self.device).eval()
        most = max(parameter.numel() for parameter in block.parameters())
        if most > len(self.noise):
            self.noise = torch.rand(most, device=self.device).sub_(0.5).to(self.dtype)
        for parameter in block.parameters():
            parameter.copy_(self.noise[: parameter.numel()].view_as(parameter))
        self._select(block)
        return block

    def _shown(self, widths: Widths) -> dict[str, int]:
        """The widths that are narrower than the full ones."""
        return {role: width for role, width in widths.items() if width < self.grid[role][-1]}

    def _select(self, module: nn.Module) -> None:
        """Let all indices select random entries, as a plan does."""
        for name, index_W in module.named_buffers():
            if name.endswith("index"):
                chosen_W = torch.randperm(self.config.hidden_size)[: len(index_W)].sort().values
                index_W.copy_(chosen_W)

    def narrow(
        self, widths: Sequence[Widths], of_base: Sequence[int], num_tokens: int | None = None
    ) -> Any:
        """A narrow model with random weights.

        Args:
            widths: Widths of its blocks.
            of_base: Which block of the model each of them is.
            num_tokens: Size of its vocabulary; None means that of the model.
        """
        found, fields = config_class(narrow_type(self.config.model_type)), self.config.to_dict()
        fields |= {n: [fields[n][b] for b in of_base] for n in _PER_BLOCK if fields.get(n)}
        fields |= {"block_widths": [dict(own) for own in widths], "num_hidden_layers": len(widths)}
        if num_tokens is not None:
            fields |= {"vocab_size": num_tokens, "pad_token_id": None}
        return self._made(found.from_dict(fields))

    def _made(self, config: PreTrainedConfig) -> Any:
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=self.dtype).to(self.device).eval()
        self._select(model)
        return model

    def _calls(self, model: Any, phase: str) -> list[_Call]:
        """Run a model once in a phase, and record the arguments of its blocks."""
        how, cache = self.how, DynamicCache(config=model.config)
        ids_BT = torch.randint(_FEW_TOKENS, (how.batch_size, how.prompt_tokens), device=self.device)
        if phase == "decode":
            before = how.prompt_tokens + how.new_tokens // 2
            ids_BT = torch.randint(_FEW_TOKENS, (how.batch_size, before), device=self.device)
            model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
            ids_BT = ids_BT[:, :1]
        kept, calls = copy.deepcopy(cache), list[_Call]()

        def record(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
            (name,) = (key for key, value in named.items() if isinstance(value, Cache))
            others = {key: value for key, value in named.items() if key != name}
            calls.append(_Call(arguments, others, (name, kept)))

        blocks = blocks_of(model, self.family)
        hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
        model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
        for hook in hooks:
            hook.remove()
        return calls

    def _rest(self) -> dict[str, float]:
        """Seconds of a model without blocks, by phase."""
        fields = self.config.to_dict()
        fields |= {name: fields[name][:1] for name in _PER_BLOCK if fields.get(name)}
        model = self._made(type(self.config).from_dict(fields | {"num_hidden_layers": 1}))
        model.set_submodule(self.family.blocks, nn.ModuleList())
        how, found = self.how, {}
        for phase, length in (("prefill", how.prompt_tokens), ("decode", 1)):
            ids_BT = torch.zeros(how.batch_size, length, dtype=torch.long, device=self.device)
            times = []
            for _ in range(2 * how.rounds + 1):
                cache = DynamicCache(config=model.config)
                self.walked[phase].sum()
                begin = now(how.clock, self.device)
                model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                times.append(now(how.clock, self.device) - begin)
            found[phase] = median(times[1:])
        return found

    def _whole(self, table: LatencyTable) -> dict[str, list[float]]:
        """Time of whole models over that of the table, by phase; the first one is uncut."""
        how, config = self.how, self.config
        count, draw = min(how.blocks, config.num_hidden_layers), random.Random(how.seed)
        models = {}
        for number in range(how.models):
            widths = [self._drawn(draw) if number else {} for _ in range(count)]
            models[str(number)] = self.narrow(widths, range(count))
        shape = (how.batch_size, how.prompt_tokens, how.new_tokens)
        speeds = measure_speed(models, *shape, repeats=how.rounds, clock=how.clock)
        return {
            phase: [
                getattr(speeds[name], f"{phase}_seconds") / table.seconds(model, phase)
                for name, model in models.items()
            ]
            for phase in PHASES
        }

    def _drawn(self, draw: random.Random) -> dict[str, int]:
        """Random widths of a block, from a quarter of the full ones up."""
        widths = {}
        for role, grid in self.grid.items():
            size, multiple = grid[-1], 1 if role == HEADS else self.multiple
            narrow = [*range(multiple, size, multiple), size]
            widths[role] = draw.choice([width for width in narrow if 4 * width >= size])
        return self._shown(widths)
