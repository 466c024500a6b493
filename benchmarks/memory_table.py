"""Predicted and measured memory of mask learning, at a size for two cores.

A random Llama is written to a temporary folder. Each setting runs in a separate process: a first
step of a tiny model loads the libraries, then the model is read and two steps of `MaskLearning` are
made, forward, backward and optimiser. The growth of the peak resident set is measured, and the peak
of live tensor bytes in a step, counted by tracking storages in the real run. The figures are
measured over predicted; a ratio near 1 confirms the table of docs/memory.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.data import write_figures
from secateur.modules.frozen_base import FrozenBase
from secateur.modules.mask_learning import MaskLearning
from secateur.modules.quantisation import EightBit, FourBit, Quantisation
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.losses import LossWeights
from secateur.pruning.widths.hypernetwork import SharedHeads
from secateur.pruning.widths.learning import GateLearning, Penalty
from secateur.pruning.widths.live_bytes import LiveBytes
from secateur.pruning.widths.memory import ORIGINAL, Run, footprint

MB = 1e6


@dataclass(frozen=True)
class Setting:
    """What is varied."""

    dtype: str
    checkpointing: bool
    quantisation: Quantisation | None = None


SETTINGS = {
    "float32": Setting("float32", False),
    "float32_checkpointing": Setting("float32", True),
    "bfloat16": Setting("bfloat16", False),
    "eight_bit_checkpointing": Setting("bfloat16", True, EightBit()),
    "four_bit_checkpointing": Setting("bfloat16", True, FourBit()),
}


def write_model(folder: Path, width: int, blocks: int) -> None:
    """A random Llama with grouped queries, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def step_of(folder: Path, setting: Setting, tokens: int) -> tuple[Callable[[], None], MaskLearning]:
    """A full step of MaskLearning."""
    module = MaskLearning(
        str(folder),
        hypernetwork=SharedHeads,
        learning=GateLearning(Penalty(), LossWeights(1.0, 1.0), start=None),
        frozen=FrozenBase(
            dtype=setting.dtype,
            quantisation=setting.quantisation,
            gradient_checkpointing=setting.checkpointing,
        ),
    )
    module.trainer = Trainer(
        logger=False, enable_checkpointing=False, max_steps=1000, accelerator="cpu"
    )
    module.configure_model()
    optimizer = module.configure_optimizers()["optimizer"]
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    input_BT = torch.randint(4096, (1, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        loss = module.training_step({"input_ids": input_BT}, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, module


def peak_bytes() -> int:
    """Peak resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(tiny: Path, folder: Path, setting: Setting, tokens: int) -> dict[str, float]:
    """Growth of the peak resident set, and peak of live tensor bytes, in a fresh process."""
    queue: multiprocessing.Queue[dict[str, float]] = multiprocessing.get_context("fork").Queue()

    def work() -> None:
        warm, _ = step_of(tiny, setting, 16)
        warm()
        del warm
        before = peak_bytes()
        step, module = step_of(folder, setting, tokens)
        step()
        step()
        resident = peak_bytes() - before
        model: Any = module.model
        lasting = [*model.parameters(), *model.buffers(), *module.hypernetwork.parameters()]
        live = LiveBytes(lasting)
        with live:
            step()
        queue.put({"resident": resident, "live": live.peak})

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    found = queue.get()
    process.join()
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512, help="model width, a multiple of 128")
    parser.add_argument("--blocks", type=int, default=8, help="blocks")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the one window")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"width": args.width, "blocks": args.blocks, "tokens": args.tokens}
    ratios: dict[str, list[float]] = {"resident": [], "step": []}
    with tempfile.TemporaryDirectory() as temporary:
        tiny, folder = Path(temporary) / "tiny", Path(temporary) / "model"
        write_model(tiny, 128, 1)
        write_model(folder, args.width, args.blocks)
        for name in args.only:
            setting = SETTINGS[name]
            found = measure(tiny, folder, setting, args.tokens)
            need = footprint(
                BaseModel(folder).config,
                Run(
                    dtype=getattr(torch, setting.dtype),
                    storage=setting.quantisation.storage if setting.quantisation else ORIGINAL,
                    window_tokens=args.tokens,
                    checkpointing=setting.checkpointing,
                ),
            )
            # Only tensors created in the step are tracked, not weights and optimiser states.
            step = need.total - need.lasting
            ratios["resident"].append(found["resident"] / need.total)
            ratios["step"].append(found["live"] / step)
            figures |= {
                f"{name}_predicted_mb": need.total / MB,
                f"{name}_resident_mb": found["resident"] / MB,
                f"{name}_predicted_step_mb": step / MB,
                f"{name}_live_step_mb": found["live"] / MB,
                f"{name}_resident_over_predicted": ratios["resident"][-1],
                f"{name}_step_over_predicted": ratios["step"][-1],
            }
    figures |= {
        "resident_over_predicted_worst": max(ratios["resident"]),
        "step_over_predicted_worst": max(ratios["step"]),
        "threads": args.threads,
    }
    write_figures(figures, args.json)


if __name__ == "__main__":
    main()
