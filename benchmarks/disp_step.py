"""Time and memory of a mask-learning step over a plain step of the same frozen model.

The opponent is a forward pass with labels and a backward pass to the embeddings of the stock
transformers model, weights frozen: the minimum for any method that learns from the loss of a frozen
model. A third step is one after the masks have settled, with distillation and gains. All run in one
process, interleaved; the figures are medians. Memory is the growth of the peak resident set over
the loaded model, each in a separate process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from benchmarks.data import WINDOW_TOKENS, data_folder, write_figures
from secateur.modules import MaskLearning
from secateur.pruning.files.base_model import BaseModel


def plain_step(folder: str) -> Callable[[Tensor], None]:
    """Forward with labels and backward to the embeddings of the frozen stock model."""
    model = BaseModel(Path(folder)).load(torch.float32)
    model.requires_grad_(False)

    def step(input_BT: Tensor) -> None:
        embedded = model.get_input_embeddings()(input_BT).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=input_BT, use_cache=False).loss.backward()

    return step


class _Settled(MaskLearning):
    """A module that is always at the first step after the masks have settled."""

    @property
    def global_step(self) -> int:
        return self.mask_steps


def mask_step(folder: str, kind: type[MaskLearning] = MaskLearning) -> Callable[[Tensor], None]:
    """A full step of MaskLearning: sample, forward, loss, backward, optimiser."""
    module = kind(folder)
    # One of 1000 steps is timed repeatedly: the first, unless `kind` sets another.
    module.trainer = Trainer(logger=False, enable_checkpointing=False, max_steps=1000)
    module.configure_model()
    optimizer = module.configure_optimizers()["optimizer"]
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]

    def step(input_BT: Tensor) -> None:
        loss = module.training_step({"input_ids": input_BT}, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def peak_growth_mb(make: Callable[[], Callable[[Tensor], None]], input_BT: Tensor) -> float:
    """Growth of the peak resident set in MB while three steps are made, in a fresh process."""
    queue: multiprocessing.Queue[float] = multiprocessing.get_context("fork").Queue()

    def work() -> None:
        step = make()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(3):
            step(input_BT)
        queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    grown = queue.get()
    process.join()
    return grown


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="model folder (default: llama7m_mha of the data)")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds of steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model or str(data_folder() / "models" / "llama7m_mha")
    generator = torch.Generator().manual_seed(0)
    vocabulary = BaseModel(Path(folder)).config.vocab_size
    input_BT = torch.randint(vocabulary, (args.batch, WINDOW_TOKENS), generator=generator)

    # Memory first: forked children must not inherit the memory of the timed steps.
    memory = {
        "plain": peak_growth_mb(lambda: plain_step(folder), input_BT),
        "masks": peak_growth_mb(lambda: mask_step(folder), input_BT),
    }
    steps = {
        "plain": plain_step(folder),
        "masks": mask_step(folder),
        "settled": mask_step(folder, _Settled),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step(input_BT)
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    plain_ms, masks_ms, settled_ms = (statistics.median(t) * 1e3 for t in times.values())
    write_figures(
        {
            "step_over_floor": masks_ms / plain_ms,
            "step_over_floor_pairs": statistics.median(
                b / a for a, b in zip(times["plain"], times["masks"], strict=True)
            ),
            "plain_ms": plain_ms,
            "masks_ms": masks_ms,
            "settled_ms": settled_ms,
            "settled_over_floor": settled_ms / plain_ms,
            "plain_peak_growth_mb": memory["plain"],
            "masks_peak_growth_mb": memory["masks"],
            "memory_over_floor": memory["masks"] / memory["plain"],
            "repeats": args.repeats,
            "threads": args.threads,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
