"""What sharding and growth cost: overhead at one rank, exponents of growth, checkpoint time.

- The opponent of the strategy is the same run without it: two fits of mask learning on one rank, in
  one process, turn by turn; medians of the steps.
- Step and checkpoint are timed on random Llamas of growing depth and width; an exponent is the
  slope of log time over log size.
- The share of a checkpoint is that of a 500-step interval at the size of the measured model.
- Memory of the hypernetwork (weights, gradients and two averages of Adam, float32) is counted at
  the shapes of LLaMA-2 7B, 13B and 70B, over that of the frozen model in bf16.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.data import write_figures
from modules import MaskLearning, TextData, Zero
from pruning.families import family_of, skeleton
from pruning.hypernetwork import GRUHypernetwork
from pruning.sites import find_sites
from tests.runs import write_text
from tests.tiny import tiny_tokenizer

SHAPES = {  # width, MLP width, blocks, heads, heads of keys
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}


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
        vocab_size=512,
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


def fit(folder: Path, strategy: Any, steps: int) -> Times:
    """A short fit; the first two steps are left out."""
    times = Times(folder)
    data = TextData(
        str(folder / "text.json"),
        tokenizer=str(folder / "base"),
        window_tokens=128,
        batch_size=4,
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
    trainer.fit(MaskLearning(str(folder / "base"), settle=0.0), data)
    times.steps = times.steps[2:]
    return times


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log seconds over log size, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean = statistics.fmean(x)
    spread = sum((a - mean) ** 2 for a in x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / spread


def hypernetwork_share(shape: tuple[int, int, int, int, int]) -> float:
    """Bytes to train the hypernetwork over those of the frozen model in bf16."""
    width, mlp, blocks, heads, keys = shape
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=keys,
    )
    model = skeleton(config)
    sizes = [site.size for site in find_sites(model, family_of(config))]
    with torch.device("meta"):
        trained = sum(p.numel() for p in GRUHypernetwork(sizes).parameters())
    return trained * 16 / (model.num_parameters() * 2)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a fit")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the two strategies")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base", 256, 4)
        plain, sharded = list[float](), list[float]()
        for _ in range(args.repeats):
            plain += fit(base, "auto", args.steps).steps
            sharded += fit(base, Zero(stage=3), args.steps).steps
        figures["step_zero3_over_none"] = statistics.median(sharded) / statistics.median(plain)
        for name, sizes, shape in (
            ("blocks", [2, 4, 8, 16], lambda blocks: (128, blocks)),
            ("width", [128, 256, 512], lambda width: (width, 2)),
        ):
            steps, checkpoints = [], []
            for size in sizes:
                folder = make_base(Path(scratch) / f"{name}{size}", *shape(size))
                times = fit(folder, "auto", args.steps)
                steps.append(statistics.median(times.steps))
                checkpoints.append(times.checkpoint)
            figures[f"step_exponent_{name}"] = exponent(sizes, steps)
            figures[f"checkpoint_exponent_{name}"] = exponent(sizes, checkpoints)
            figures[f"checkpoint_share_{name}_{sizes[-1]}"] = checkpoints[-1] / (500 * steps[-1])
    for name, shape in SHAPES.items():
        figures[f"hypernetwork_memory_over_frozen_{name}"] = hypernetwork_share(shape)
    write_figures(figures, args.json)


if __name__ == "__main__":
    main()
