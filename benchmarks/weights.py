"""Time and memory of Wanda, DaSS and SparseGPT, over the minimum and over a plain loop.

The minimum is two forward passes of the calibration windows through every block and, for SparseGPT,
one product x x^T of every input tensor of its matrices; it is timed separately, in the same run.
`overhead_share` is the rest over the total, for the worst of the methods.

The plain loop is the usual implementation: one window at a time, statistics and, for SparseGPT, a
Hessian and its factor for every matrix, without using symmetry or shared inputs. It prunes with the
same parts.

Seconds are wall time; `overhead_share_cpu` is the same share of the CPU time of the process, all
threads together, which depends less on other programs.

Memory is that of all tensors besides the model: every storage is tracked from creation to release.
The formula is that of the block loop (pruning/weights/loop.py): states, statistics and working
copies of one block.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.data import WINDOW_TOKENS, data_folder, write_figures
from secateur.pruning.blocks.source import CalibrationStates, LiveBlocks
from secateur.pruning.blocks.statistics import Gram, Inputs
from secateur.pruning.weights.collect import collect
from secateur.pruning.weights.dass import DaSS
from secateur.pruning.weights.layers import MlpOnly
from secateur.pruning.weights.loop import prune_weights
from secateur.pruning.weights.parts import Matrix
from secateur.pruning.weights.pattern import Unstructured
from secateur.pruning.weights.recipe import WeightRecipe
from secateur.pruning.weights.sparse_gpt import ObsSaliency, SparseGPTSweep
from secateur.pruning.widths.live_bytes import LiveBytes

HALF = Unstructured(0.5)
METHODS = {
    "wanda": WeightRecipe(HALF),
    "dass": WeightRecipe(HALF, DaSS(), matrices=MlpOnly()),
    "sparsegpt": WeightRecipe(HALF, ObsSaliency(), compensation=SparseGPTSweep()),
}


def make_model(width: int | None) -> Any:
    """The 7 M LLaMA, or a random one of 4 blocks."""
    if width is None:
        folder = data_folder() / "models" / "llama7m"
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def unavoidable(model: Any, recipe: WeightRecipe, windows_NT: Tensor) -> None:
    """Two forward passes through every block, and the products that a recipe needs."""
    source = LiveBlocks(model)
    states = CalibrationStates(source, windows_NT, 8)
    for index, block in enumerate(source.blocks):
        states.advance(index, block)
    for index, block in enumerate(source.blocks):
        if Gram in recipe.needs:
            paths = [linear.path for linear in recipe.pruned(source.linears[index])]
            # a forward pass and the products
            collect(block, index, paths, {Gram}, states.calls(index))
        else:
            states.advance(index, block)


@torch.no_grad()
def plain(model: Any, recipe: WeightRecipe, windows_NT: Tensor) -> None:
    """One window at a time, with separate statistics for every matrix."""
    source = LiveBlocks(model)
    states = CalibrationStates(source, windows_NT, 1)
    for index, block in enumerate(source.blocks):
        linears = recipe.pruned(source.linears[index])
        paths = {linear.path for linear in linears} | {
            linear.middle for linear in linears if linear.middle
        }
        own: dict[str, Inputs] = {}
        for path in sorted(paths):
            layer: Any = block.get_submodule(path)
            own[path] = _PlainInputs(recipe.needs, layer.in_features, layer.weight.device)
            layer.register_forward_pre_hook(lambda m, args, i=own[path]: i.update(args[0], 1))
        states_before = list(states.hidden)
        states.advance(index, block)
        states.hidden = states_before
        for module in block.modules():
            module._forward_pre_hooks.clear()
        for linear in linears:
            weight: Any = block.get_submodule(linear.path).weight
            matrix = Matrix(
                linear=linear,
                weight_OI=weight.float(),
                inputs=own[linear.path],
                middle=own[linear.middle] if linear.middle else None,
                pattern=recipe.pattern,
                group=recipe.group(linear),
                note=print,
            )
            mask_OI = recipe.score.mask(matrix)
            if recipe.compensation is not None:
                weight.copy_(recipe.compensation.weight(matrix, mask_OI))
            weight.mul_(mask_OI)
        states.advance(index, block)


class _PlainGram(Gram):
    def update(self, x_BTI: Tensor) -> None:
        x_NI = x_BTI.flatten(0, 1)
        self._upper_II += x_NI.T @ x_NI


class _PlainInputs(Inputs):
    def __init__(self, kinds: Any, width: int, device: torch.device) -> None:
        super().__init__(kinds, width, device)
        if Gram in kinds:
            self._by_kind[Gram] = _PlainGram(width, device)


def ours(model: Any, recipe: WeightRecipe, windows_NT: Tensor) -> None:
    """The loop of `secateur.pruning.weights`."""
    prune_weights(LiveBlocks(model), recipe, windows_NT)


def seconds(run: Callable[[Any], None], width: int | None) -> tuple[float, float]:
    """Wall and CPU time on a fresh model."""
    model = make_model(width)
    wall, cpu = time.perf_counter(), time.process_time()
    run(model)
    return time.perf_counter() - wall, time.process_time() - cpu


@torch.no_grad()
def peak_growth_mb(model: Any, recipe: WeightRecipe, windows_NT: Tensor) -> float:
    """Peak MB of live tensors besides the model and the windows."""
    with LiveBytes([*model.parameters(), *model.buffers(), windows_NT]) as live:
        ours(model, recipe, windows_NT)
    return live.peak / 2**20


def formula_mb(model: Any, recipe: WeightRecipe, windows: int, tokens: int) -> float:
    """Calibration states, plus the larger of the memory of a batch and of a matrix being pruned.

    States: windows x T x D numbers. A batch: three tensors of the width of the MLP, five of that of
    the model. Hessians: three of D x D and one of M x M. While a block is pruned: masks, one byte
    per weight; with Hessians the weights of the sweep, the factors of the narrow Hessians and six
    copies of the wide one while it is factorised; otherwise six copies of a matrix while it is
    sorted.
    """
    width, middle = model.config.hidden_size, model.config.intermediate_size
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    states = windows * tokens * width
    batch = 8 * tokens * (3 * middle + 5 * width)
    if Gram in recipe.needs:
        narrow, wide = 3 * width**2, middle**2
        work = narrow + wide + max(batch, 1.25 * block + narrow + 6 * wide)
    else:
        work = max(batch, 0.25 * block + 6 * width * middle)
    return 4 * (states + work) / 2**20


def summary(name: str, times: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Medians of the rounds: seconds of each run, and the overhead over the total."""
    median = {run: statistics.median(wall for wall, _ in values) for run, values in times.items()}
    figures = {f"{name}_{run}_seconds": value for run, value in median.items()}
    for place, clock in enumerate(("", "_cpu")):
        figures[f"{name}_overhead_share{clock}"] = statistics.median(
            1 - floor[place] / total[place]
            for floor, total in zip(times["unavoidable"], times["ours"], strict=True)
        )
    if "plain" in median:
        figures[f"{name}_over_plain"] = median["ours"] / median["plain"]
    return figures


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, help="random Llama of this width (default: llama7m)")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain loop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    windows_NT = torch.randint(4096, (args.windows, WINDOW_TOKENS), generator=generator)

    runs = {"unavoidable": unavoidable, "ours": ours}
    if not args.no_plain:
        runs["plain"] = plain
    figures: dict[str, Any] = {"windows": args.windows, "threads": args.threads}
    for name in args.methods:
        recipe = METHODS[name]
        model = make_model(args.width)
        formula = formula_mb(model, recipe, args.windows, WINDOW_TOKENS)
        growth = peak_growth_mb(model, recipe, windows_NT)
        figures |= {f"{name}_peak_growth_mb": growth, f"{name}_formula_mb": formula}
        figures[f"{name}_memory_over_formula"] = growth / formula
        del model
        times: dict[str, list[tuple[float, float]]] = {run: [] for run in runs}
        for _ in range(args.repeats):
            for run, function in runs.items():
                bound = partial(function, recipe=recipe, windows_NT=windows_NT)
                times[run].append(seconds(bound, args.width))
        figures |= summary(name, times)
        write_figures(figures, args.json)
    for clock in ("", "_cpu"):
        shares = [figures[f"{name}_overhead_share{clock}"] for name in args.methods]
        figures[f"overhead_share{clock}"] = max(shares)
    write_figures(figures, args.json)


if __name__ == "__main__":
    main()
