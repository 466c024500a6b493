"""Peak memory of a rank under ZeRO-3 over that of a single rank, on a random Llama of 800 MB.

Each rank is a separate process on this machine. Its peak resident set, above that of the same
process after its imports, is taken at load (model, hypernetwork and strategy set up), in training
(steps of mask learning, both phases) and at export (surgery, verification, measurement). The figure
is the largest share of the ranks: a rank of two over the single one, which uses no sharding
strategy.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.data import write_figures
from secateur.callbacks import ExportModel, SaveCheckpoint
from secateur.modules import MaskLearning, TextData, Zero
from secateur.modules.frozen_base import FrozenBase
from secateur.pruning.widths.hypernetwork import FreeLogits
from secateur.pruning.widths.learning import GateLearning, Penalty
from tests.runs import write_text
from tests.tiny import tiny_tokenizer

PHASES = ("load", "training", "export")
# glibc allocates small blocks from a heap that does not shrink; the size limit starts here and
# grows up to 32 MB as memory is freed. With a fixed limit, resident memory is memory in use, in all
# runs compared.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}


def peak_mb() -> float:
    """Peak resident set since the last reset, MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Reset the peak to the present resident set."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class Peaks(Callback):
    """Record the peak of every phase of a fit."""

    def __init__(self) -> None:
        reset_peak()
        self.baseline = peak_mb()
        self.figures: dict[str, float] = {}

    def _note(self, phase: str) -> None:
        self.figures[phase] = peak_mb() - self.baseline
        reset_peak()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._note("load")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._note("training")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._note("export")


def make_model(folder: Path, blocks: int) -> None:
    """A random Llama, its tokenizer, and a text.

    The files are bf16 and are read as float32: weights of the same type would stay mapped files on
    a single rank, which count as its memory only once they are used.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4_000,  # 4 % of the parameters, less than 3 % in a model of 13B
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_text(folder / "text.json")


def work(folder: Path, num_ranks: int, out: Path) -> None:
    """One rank: fit, export, and write its figures."""
    import bitsandbytes  # noqa: F401 (transformers imports it late; the baseline is to have it)
    import deepspeed  # noqa: F401

    peaks = Peaks()
    data = TextData(
        str(folder / "text.json"),
        tokenizer=str(folder / "base"),
        window_tokens=32,
        batch_size=2,
        validation_windows=2,
        cache_dir=str(folder / "cache"),
    )
    # Free logits, so that the measured share is that of the frozen model. No gains: folded into
    # bf16 they would be rounded, and the verification of the single rank in float32 would fail.
    module = MaskLearning(
        str(folder / "base"),
        hypernetwork=FreeLogits,
        learning=GateLearning(Penalty(), start=None),
        settle=None,
        frozen=FrozenBase(dtype="float32"),
    )
    root = folder / f"run{num_ranks}"
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        # 1.5 % of the model, like the default for a 13B model.
        strategy=Zero(stage=3, live_parameters=3_000_000) if num_ranks > 1 else "auto",
        max_steps=3,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        default_root_dir=root,
        callbacks=[SaveCheckpoint(), ExportModel(), peaks],
    )
    trainer.fit(module, data)
    path = out.with_suffix(f".{trainer.global_rank}.json")
    path.write_text(json.dumps(peaks.figures), encoding="utf-8")


def measure(folder: Path, num_ranks: int) -> list[dict[str, float]]:
    """Figures of every rank of one run."""
    out = folder / f"figures{num_ranks}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(num_ranks):
        place = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **_GIVE_BACK}
        if num_ranks > 1:
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
            place |= {"WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "benchmarks.sharded_memory", "--work", str(folder)]
        command += ["--ranks", str(num_ranks), "--out", str(out)]
        ranks.append(subprocess.Popen(command, env=os.environ | place))
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"The ranks of a run of {num_ranks} ended with {codes}.")
    return [json.loads(out.with_suffix(f".{r}.json").read_text()) for r in range(num_ranks)]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="ranks to compare with one")
    parser.add_argument("--blocks", type=int, default=15, help="blocks of the model; 15 are 800 MB")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # a rank: its folder
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.ranks, args.out)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder, args.blocks)
        files = (folder / "base").glob("*.safetensors")
        size = 2 * sum(path.stat().st_size for path in files) / 2**20  # as float32
        (one,), several = measure(folder, 1), measure(folder, args.ranks)
    worst = {phase: max(rank[phase] for rank in several) for phase in PHASES}
    shares = {phase: worst[phase] / one[phase] for phase in PHASES}
    write_figures(
        {
            "rank_share": max(shares.values()),
            **{f"rank_share_{phase}": shares[phase] for phase in PHASES},
            **{f"one_{phase}_mb": one[phase] for phase in PHASES},
            **{f"rank_{phase}_mb": worst[phase] for phase in PHASES},
            "model_mb": size,
            "ranks": args.ranks,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
