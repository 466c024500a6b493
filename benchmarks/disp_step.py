"""Time and memory of a mask-learning step over a plain step of the same frozen model.

The opponent is a forward pass with labels and a backward pass to the embeddings of the stock
transformers model, weights frozen: what any method must do that learns from the loss of a frozen
model. The steps are those of a run by the trainer, half of them while masks are learned, half after
they have settled: distillation from the dense model, and gains of the one that was cut to half of
the FLOPs and refitted. A plain step on the same batch comes before each; the figures are medians.
Masks start from the magnitude of weights, and the refit reads little text: neither is timed.

Memory is the growth of the peak resident set over the loaded model, each in a separate process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from benchmarks.data import WINDOW_TOKENS, data_folder, write_figures
from secateur.modules import MaskLearning, TextData
from secateur.modules.settling import Settle
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.widths.gradual_ranking import GradualRanking
from secateur.pruning.widths.learning import GateLearning, Importance
from secateur.pruning.widths.width_magnitude import WidthMagnitude


def plain_step(folder: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], None]:
    """Forward with labels and backward to the embeddings of the frozen stock model."""
    model = BaseModel(Path(folder)).load(dtype)
    model.requires_grad_(False)

    def step(input_BT: Tensor) -> None:
        embedded = model.get_input_embeddings()(input_BT).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=input_BT, use_cache=False).loss.backward()

    return step


def mask_step(folder: str) -> Callable[[Tensor], None]:
    """A full step of MaskLearning: sample, forward, loss, backward, optimiser."""
    module = MaskLearning(folder)
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


class TimeSteps(Callback):
    """Times every step of a run, and a plain step before it.

    Args:
        plain: A plain step.
        clock: Tells the time, in seconds.
    """

    def __init__(self, plain: Callable[[Tensor], None], clock: Callable[[], float]) -> None:
        self.plain, self.clock = plain, clock
        # Pairs of a plain step and the one after it.
        self.seconds: dict[str, list[tuple[float, float]]] = {"masks": [], "settled": []}
        self._plain_seconds = self._start = 0.0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a plain step on the same batch, and note when the step of the run begins."""
        before = self.clock()
        self.plain(batch["input_ids"])
        self._start = self.clock()
        self._plain_seconds = self._start - before

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note how long the step took."""
        name = "settled" if bool(pl_module.settled_N.any()) else "masks"
        self.seconds[name].append((self._plain_seconds, self.clock() - self._start))


def run(folder: str, batch_size: int, repeats: int, timing: TimeSteps) -> None:
    """As many steps of masks as of the settled model, and two of each that do not count."""
    steps = 2 * (repeats + 2)
    module = MaskLearning(
        folder,
        learning=GateLearning(start=Importance(WidthMagnitude(), GradualRanking(rounds=1))),
        settle=Settle(fraction=0.5, refit_windows=16, held_back_windows=2),
    )
    text = str(data_folder() / "text" / "c4_masktrain.json")
    data = TextData(text, tokenizer=folder, window_tokens=WINDOW_TOKENS, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        Trainer(
            default_root_dir=scratch,
            accelerator="cpu",
            max_steps=steps,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[timing],
        ).fit(module, data)


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
    parser.add_argument("--cpu-time", action="store_true", help="processor time; one thread")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time needs --threads 1: waiting threads count as well")
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
    clock = time.process_time if args.cpu_time else time.perf_counter
    timing = TimeSteps(plain_step(folder), clock)
    run(folder, args.batch, args.repeats, timing)
    figures: dict[str, Any] = {}
    # The first step after the masks have settled holds cut and refit.
    for name, pairs in ((name, own[2:]) for name, own in timing.seconds.items()):
        plain, own = (statistics.median(column) for column in zip(*pairs, strict=True))
        key = "step" if name == "masks" else name
        figures |= {
            f"{key}_over_floor": own / plain,
            f"{key}_over_floor_pairs": statistics.median(b / a for a, b in pairs),
            f"{name}_ms": own * 1e3,
            f"plain_ms_beside_{name}": plain * 1e3,
        }
    figures |= {f"{name}_peak_growth_mb": grown for name, grown in memory.items()}
    figures["memory_over_floor"] = memory["masks"] / memory["plain"]
    write_figures(figures | {"repeats": args.repeats, "threads": args.threads}, args.json)


if __name__ == "__main__":
    main()
