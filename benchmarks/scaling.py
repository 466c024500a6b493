"""Cost of sharding and of model size: overhead at one rank, scaling, checkpoints, hypernetwork.

- The opponent of the strategy is the same run without it: two fits of mask learning on one rank, in
  one process, in turns; medians of the steps.
- Step and checkpoint are timed on random Llamas of growing depth and width; an exponent is the
  slope of log time over log size.
- The share of a checkpoint is that of a 500-step interval, at the size of the demo (width 128, 4
  blocks, 16 x 128 tokens).
- At the shapes of LLaMA-2 7B, 13B and 70B, memory of the hypernetwork (weights, gradients and two
  averages of Adam, float32) is counted, over that of the frozen model in bf16. Its time (forward,
  backward, AdamW) is measured on an eighth of the sites and extrapolated; so is that of the frozen
  blocks (forward, and backward to their inputs, float32), from one block and few tokens. The share
  is that of a step of 2048 tokens on this processor.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from benchmarks.data import write_figures
from secateur.modules import MaskLearning, TextData, Zero
from secateur.pruning.families import family_of, skeleton
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.hypernetwork import GRUHypernetwork, SharedHeads
from secateur.pruning.widths.learning import GateLearning, Penalty
from secateur.pruning.widths.memory import llama2
from tests.runs import write_text
from tests.tiny import tiny_tokenizer

HYPERNETWORKS = {"hypernetwork": GRUHypernetwork, "shared_heads": SharedHeads}
STEP_TOKENS = 2048
FEWER = 8  # the hypernetwork is timed on this fraction of the sites


class Times(Callback):
    """Seconds of every step, and of one checkpoint at the end."""

    def __init__(self, folder: Path) -> None:
        self.path, self.steps = folder / "timed.ckpt", list[float]()
        self.checkpoint = math.nan

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(time.perf_counter() - self._start)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        start = time.perf_counter()
        trainer.save_checkpoint(self.path)
        self.checkpoint = time.perf_counter() - start


def make_base(folder: Path, width: int, blocks: int) -> Path:
    """A random Llama with a tokenizer and a text beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_text(folder / "text.json")
    return folder


def fit(folder: Path, strategy: Any, steps: int, batch_size: int = 4) -> Times:
    """A short fit on windows of 128 tokens; the first two steps are left out."""
    times = Times(folder)
    data = TextData(
        str(folder / "text.json"),
        tokenizer=str(folder / "base"),
        window_tokens=128,
        batch_size=batch_size,
        cache_dir=str(folder / "cache"),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=steps + 2,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[times],
    )
    trainer.fit(
        MaskLearning(
            str(folder / "base"), learning=GateLearning(Penalty(), start=None), settle=None
        ),
        data,
    )
    times.steps = times.steps[2:]
    return times


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log seconds over log size, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean = statistics.fmean(x)
    spread = sum((a - mean) ** 2 for a in x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / spread


def site_sizes(config: Any) -> list[int]:
    """Entries of every site of a model."""
    return [site.size for site in find_sites(skeleton(config), family_of(config))]


def memory_share(config: Any, kind: Callable[[list[int]], nn.Module]) -> float:
    """Bytes to train a hypernetwork over those of the frozen model in bf16."""
    with torch.device("meta"):
        trained = sum(p.numel() for p in kind(site_sizes(config)).parameters())
    return trained * 16 / (skeleton(config).num_parameters() * 2)


def hypernetwork_seconds(config: Any, kind: Callable[[list[int]], nn.Module]) -> float:
    """Forward, backward and AdamW of a hypernetwork, from a fraction of the blocks."""
    fewer = copy.deepcopy(config)
    fewer.num_hidden_layers //= FEWER
    network = kind(site_sizes(fewer))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        network().square().sum().backward()
        optimizer.step()

    return FEWER * seconds(step)


def frozen_seconds(config: Any, tokens: int) -> float:
    """Forward and backward of the frozen blocks on `STEP_TOKENS`, extrapolated from one block."""
    one = copy.deepcopy(config)
    one.num_hidden_layers, one.vocab_size = 1, 32
    block = LlamaModel(one).requires_grad_(False)
    hidden_BTD = torch.randn(1, tokens, one.hidden_size, requires_grad=True)

    def step() -> None:
        block(inputs_embeds=hidden_BTD, use_cache=False).last_hidden_state.sum().backward()

    return seconds(step) * config.num_hidden_layers * STEP_TOKENS / tokens


def seconds(work: Callable[[], None], repeats: int = 3) -> float:
    """Median time of some work, after one turn that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fits(steps: int, repeats: int) -> dict[str, float]:
    """Figures of short fits: the strategy, growth, checkpoints."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base", 256, 4)
        plain, sharded = list[float](), list[float]()
        for _ in range(repeats):
            plain += fit(base, "auto", steps).steps
            sharded += fit(base, Zero(stage=3), steps).steps
        figures["step_zero3_over_none"] = statistics.median(sharded) / statistics.median(plain)
        for name, sizes, shape in (
            ("blocks", [2, 4, 8, 16], lambda blocks: (128, blocks)),
            ("width", [128, 256, 512], lambda width: (width, 2)),
        ):
            times = [
                fit(make_base(Path(scratch) / f"{name}{size}", *shape(size)), "auto", steps)
                for size in sizes
            ]
            medians = [statistics.median(of_size.steps) for of_size in times]
            figures[f"step_exponent_{name}"] = exponent(sizes, medians)
            written = [of_size.checkpoint for of_size in times]
            figures[f"checkpoint_exponent_{name}"] = exponent(sizes, written)
        demo = fit(make_base(Path(scratch) / "demo", 128, 4), "auto", steps, batch_size=16)
        step = statistics.median(demo.steps)
        figures |= {"demo_step_seconds": step, "demo_checkpoint_seconds": demo.checkpoint}
        figures["checkpoint_share_demo"] = demo.checkpoint / (500 * step)
    return figures


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a fit")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the two strategies")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that a block is timed on")
    parser.add_argument(
        "--only", choices=("fits", "shapes"), help="short fits, or shapes of LLaMA-2 (both)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    if args.only != "shapes":
        figures |= fits(args.steps, args.repeats)
    for size in ("7B", "13B", "70B") if args.only != "fits" else ():
        config, name = llama2(size), size.lower()
        frozen = frozen_seconds(config, args.tokens)
        figures[f"frozen_step_seconds_{name}"] = frozen
        for kind, network in HYPERNETWORKS.items():
            taken = hypernetwork_seconds(config, network)
            figures[f"{kind}_time_share_{name}"] = taken / (taken + frozen)
            figures[f"{kind}_memory_over_frozen_{name}"] = memory_share(config, network)
    write_figures(figures, args.json)


if __name__ == "__main__":
    main()
