"""Two ranks of one machine, on the CPU with gloo, under every strategy, through both phases.

What two ranks learn is compared with what one rank learns. Processors round otherwise, and so do
kernels of one processor where weights lie otherwise in memory, as those that ZeRO-3 gathers: by
about 1e-6 of the largest gradient here. AdamW with its usual `eps` of 1e-8 makes whole steps of
gradients that are nothing but rounding, and hides errors that all gradients share. With one of the
size of the gradients a step is nearly linear in them, and `STEP / 100` tells mistakes from
rounding.
"""

from __future__ import annotations

import json
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.pruning.plan import Plan
from tests.ranks import PATIENCE_SECONDS, Ranks, trained
from tests.runs import (
    NOISE,
    call,
    content,
    from_open_gates,
    learn_masks,
    make_inputs,
    on_text,
    with_callbacks,
)

pytestmark = [*NOISE, pytest.mark.slow]
STEPS, STEP = 6, 1e-3  # of the optimiser, and its learning rate
ADAMW = (
    "--model.optimizer=torch.optim.AdamW",
    f"--model.optimizer.lr={STEP}",
    "--model.optimizer.eps=1e-3",
)
STRATEGIES = {
    "ddp": "auto",
    "zero1": "{class_path: Zero, init_args: {stage: 1}}",
    "zero2": "{class_path: Zero, init_args: {stage: 2, offload_optimizer: true}}",
    "zero3": "{class_path: Zero, init_args: {stage: 3}}",
    "offloaded": "{class_path: Zero, init_args: {offload_parameters: true}}",
    "fsdp": "{class_path: ShardedDDP}",
}


# Runs


def masks(folder: Path, name: str, strategy: str | None) -> list[str]:
    """Learning of masks, then of gains, on the narrow model."""
    callbacks = ("AnnealSparsity", "TrackBudget", "PlotWidths", "SaveCheckpoint")
    watch = () if strategy is None else ("WatchRanks",)
    run = learn_masks(folder, folder / name, STEPS, callbacks + watch)
    return [*from_open_gates(run), *ADAMW, "--model.optimizer.fused=true"]


def wide_masks(folder: Path, name: str, strategy: str | None) -> list[str]:
    """Learning of masks on the wide model."""
    run = learn_masks(folder / "wide", folder / name, 4, ("SaveCheckpoint",))
    return [*from_open_gates(run), "--trainer.limit_val_batches=0"]


def recovery(folder: Path, name: str, strategy: str | None) -> list[str]:
    """Training of the wide model's own weights."""
    return [
        "fit",
        "--model=CausalLM",
        f"--model.base={folder / 'wide' / 'base'}",
        "--model.loss.distillation=1",
        *ADAMW,
        "--model.warmup_steps=1",
        *on_text(folder / "wide", folder / name),
        *with_callbacks(["SaveCheckpoint", "ExportModel"]),
        *("--trainer.max_steps=4", "--trainer.limit_val_batches=1"),
    ]


@dataclass(frozen=True)
class Run:
    """A run.

    Args:
        kind: Makes its arguments of the folder, its name and its strategy.
        strategy: Of two ranks, by its name above; None for one rank with the batches of two.
        settings: Further arguments.
        after: The run from whose checkpoint of step 3 it goes on.
    """

    kind: Callable[[Path, str, str | None], list[str]]
    strategy: str | None = None
    settings: tuple[str, ...] = ()
    after: str | None = None


CHECKPOINTING = ("--model.gradient_checkpointing=true",)
CLIPPED = ("--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.05")
VALIDATED = ("--trainer.val_check_interval=3",)
LORA = ("--model.lora.rank=3", "--model.lora.dropout=0")
HALF = ("--model.dtype=bfloat16",)
FOUR_BIT = ("--model.frozen.quantisation=FourBit",)
EIGHT_BIT = ("--model.frozen.quantisation=EightBit",)
TWO_OF_FOUR = (
    "--trainer.callbacks+=PruneWeights",
    "--trainer.callbacks.pattern=NM",
    *("--trainer.callbacks.pattern.n=2", "--trainer.callbacks.pattern.m=4"),
    *("--trainer.callbacks.calibration_windows=8", "--trainer.callbacks.held_back_windows=4"),
)
RUNS = {
    "one": Run(masks, settings=VALIDATED),
    "one_clipped": Run(masks, settings=CLIPPED),
    **{name: Run(masks, name) for name in STRATEGIES},
    "zero3": Run(masks, "zero3", (*VALIDATED, *with_callbacks(["ExportModel"]))),
    "checkpointed": Run(masks, "zero3", ("--model.frozen.gradient_checkpointing=true",)),
    "clipped_zero2": Run(masks, "zero2", CLIPPED),
    "clipped_zero3": Run(masks, "zero3", CLIPPED),
    "four": Run(masks, "ddp", FOUR_BIT),
    "one_four": Run(masks, settings=FOUR_BIT),
    "eight": Run(masks, "zero2", EIGHT_BIT),
    "one_eight": Run(masks, settings=EIGHT_BIT),
    "from_one": Run(masks, "zero2", after="one"),
    "resumed": Run(masks, "zero3", after="zero3"),
    "one_from_zero1": Run(masks, after="zero1"),
    "one_from_zero3": Run(masks, after="zero3"),
    # Heads that DeepSpeed would not keep whole by itself, and a checkpoint before which nothing has
    # gathered them: from the third step on it expects parameters in an order that it has noted.
    "saved": Run(wide_masks, "zero3"),
    "recovered": Run(recovery, "zero2"),
    "sparse": Run(recovery, "ddp", TWO_OF_FOUR),
    "full": Run(recovery, "zero3", CHECKPOINTING),
    "one_full": Run(recovery, settings=CHECKPOINTING),
    "one_from_full": Run(recovery, settings=CHECKPOINTING, after="full"),
    "lora": Run(recovery, "zero3", LORA),
    "one_lora": Run(recovery, settings=LORA),
    "one_from_lora": Run(recovery, settings=LORA, after="lora"),
    "half": Run(recovery, "zero3", HALF),
    "half_resumed": Run(recovery, "zero3", HALF, after="half"),
}


class Runs:
    """The outputs of runs; each is made when a test first asks for it.

    Args:
        folder: Where inputs and outputs go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranks = make_inputs(folder, tie_word_embeddings=True), Ranks(folder)
        # The usual weights make so wide a model chaotic: they multiply rounding by a hundred.
        make_inputs(folder / "wide", hidden_size=336, intermediate_size=1024, std=0.05)
        self._begun: set[str] = set()

    def root(self, name: str) -> Path:
        """The folder of a run's outputs."""
        if name not in self._begun:
            self._begun.add(name)
            if RUNS[name].strategy is None:
                module = call(self.arguments(name)).model
                torch.save(trained(module), self.folder / f"{name}.0.pt")
            else:
                self.ranks.run(name, self.arguments(name))
        assert (self.folder / f"{name}.0.pt").is_file(), f"{name} failed in an earlier test."
        return self.folder / name

    def arguments(self, name: str, checkpoint: Path | None = None) -> list[str]:
        """What is typed to make a run, from another checkpoint than its own if there is one."""
        run = RUNS[name]
        if run.after is not None:
            checkpoint = self.root(run.after) / "checkpoints" / "step=3.ckpt"
        arguments = [*run.kind(self.folder, name, run.strategy), *run.settings]
        arguments.append("--trainer.logger=false")
        if run.strategy is None:
            arguments.append("--data.batch_size=8")
        else:
            arguments.append("--trainer.devices=2")
            arguments.append(f"--trainer.strategy={STRATEGIES[run.strategy]}")
        return arguments if checkpoint is None else [*arguments, f"--ckpt_path={checkpoint}"]

    def state(self, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
        """What trains at the end of a run, as a rank holds it."""
        self.root(name)
        return torch.load(self.folder / f"{name}.{rank}.pt", weights_only=True)

    def saved(self, name: str, step: int) -> dict[str, Any]:
        """A checkpoint of a run."""
        path = self.root(name) / "checkpoints" / f"step={step}.ckpt"
        found: dict[str, Any] = torch.load(path, weights_only=True)
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("ranks"))
    yield made
    made.ranks.close()


# What they have to keep


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Find the same names, and weights that are no more than a hundredth of a step apart."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, atol=STEP / 100, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize(
    ("name", "opponent"),
    [(name, "one") for name in (*STRATEGIES, "from_one", "checkpointed")]
    + [("clipped_zero2", "one_clipped"), ("clipped_zero3", "one_clipped")]
    + [("four", "one_four"), ("eight", "one_eight")],
)
def test_two_ranks_learn_the_same_as_one(runs: Runs, name: str, opponent: str) -> None:
    one, here, there = runs.state(opponent), runs.state(name), runs.state(name, 1)
    assert_near(here, one)
    for key, value in here.items():
        assert torch.equal(value, there[key]), key  # bitwise, on all ranks
    assert bool((one["settled.gains"] != 1).any())  # both phases ran


def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(runs: Runs) -> None:
    resumed = runs.state("resumed")
    for key, value in runs.state("zero3").items():
        assert torch.equal(resumed[key], value), key


def test_training_goes_on_after_a_checkpoint(runs: Runs) -> None:
    assert max(value.numel() for value in runs.state("saved").values()) > 100_000
    names = {path.name for path in (runs.root("saved") / "checkpoints").iterdir()}
    assert names == {"step=3.ckpt", "step=4.ckpt"}


@pytest.mark.parametrize("name", ["recovered", "sparse"])
def test_two_ranks_train_one_model(runs: Runs, name: str) -> None:
    here, there = runs.state(name), runs.state(name, 1)
    exported = load_file(runs.root(name) / "model" / "model.safetensors")
    for key, value in here.items():
        assert torch.equal(value, there[key]), key
        assert torch.equal(value, exported.get(key.removeprefix("model."), value)), key
    zeros = {key for key, value in exported.items() if (value == 0).float().mean() == 0.5}
    assert len(zeros) == (7 * 3 if name == "sparse" else 0)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_sharded_weights_train_as_on_one_rank(runs: Runs, name: str) -> None:
    one = runs.saved(f"one_{name}", 4)
    assert max(weight.numel() for weight in one["state_dict"].values()) > 100_000 or name == "lora"
    found = runs.saved(name, 4)
    assert_near(found["state_dict"], one["state_dict"])
    assert_same_optimizer(found, one)

    root, root_of_one = runs.root(name), runs.root(f"one_{name}")
    ours, theirs = content(root / "model"), content(root_of_one / "model")
    assert ours.keys() == theirs.keys()
    told = {"model.safetensors", "secateur.json", "README.md"}  # what they weigh, measure and say
    assert {file: ours[file] for file in ours.keys() - told} == {
        file: theirs[file] for file in theirs.keys() - told
    }
    assert_near(*(load_file(r / "model" / "model.safetensors") for r in (root, root_of_one)))
    reports = (json.loads((r / "report.json").read_text()) for r in (root, root_of_one))
    mine, one_rank = (
        report["models"]["trained"]["perplexity"]["validation"]["value"] for report in reports
    )
    assert mine == pytest.approx(one_rank, rel=1e-4)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_one_rank_resumes_a_run_of_sharded_weights(runs: Runs, name: str) -> None:
    one, found = runs.saved(f"one_{name}", 4), runs.saved(f"one_from_{name}", 4)
    assert_near(found["state_dict"], one["state_dict"])
    assert_same_optimizer(found, one)


def test_divided_weights_of_a_narrow_type_go_on_bit_for_bit(runs: Runs) -> None:
    """Their float32 copies, which the optimiser steps, come from the checkpoint."""
    half, resumed = (runs.saved(name, 4)["state_dict"] for name in ("half", "half_resumed"))
    assert {value.dtype for value in half.values()} == {torch.float32}
    for key, value in half.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_a_run_of_two_ranks_resumes_on_one(runs: Runs, name: str) -> None:
    assert_near(runs.state(f"one_from_{name}"), runs.state("one"))


def assert_same_optimizer(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Find the same optimiser in two checkpoints, up to a thousandth of every average."""
    (ours,), (theirs,) = found["optimizer_states"], wanted["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, of_parameter in theirs["state"].items():
        assert ours["state"][number].keys() == of_parameter.keys()
        for key, value in of_parameter.items():
            atol = float(value.abs().max()) / 1000
            torch.testing.assert_close(ours["state"][number][key], value, atol=atol, rtol=0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_does_not_depend_on_the_number_of_ranks(runs: Runs, name: str) -> None:
    mine, one = runs.saved(name, STEPS), runs.saved("one", STEPS)
    assert mine["state_dict"].keys() == one["state_dict"].keys()
    assert not any(key.startswith("model.") for key in mine["state_dict"])
    assert_same_optimizer(mine, one)


def test_a_divided_model_is_exported_and_proven(runs: Runs) -> None:
    root, one = runs.root("zero3"), runs.state("one")
    plan = Plan.load(root / "plan")
    assert plan.provenance["step"] == STEPS
    assert plan.gains is not None
    assert sum(map(len, plan.gains.values())) == one["settled.gains"].numel()
    assert {"README.md", "model.safetensors", "plan/plan.json"} <= content(root / "model").keys()
    assert "ranks 2" in (root / "report.md").read_text(encoding="utf-8")


class Malice:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_malicious_checkpoint_does_not_run(runs: Runs, tmp_path: Path) -> None:
    malice = tmp_path / "malice.ckpt"
    torch.save({"x": Malice(tmp_path / "executed")}, malice)
    assert zipfile.is_zipfile(malice)
    arguments = runs.arguments("offloaded", malice)
    for error in runs.ranks.errors("refused", arguments):
        assert "not written by SaveCheckpoint" in error
    assert not (tmp_path / "executed").exists()


def test_a_lost_rank_ends_the_other_with_its_name(runs: Runs, tmp_path: Path) -> None:
    run = runs.arguments("ddp")
    run += [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=100000"]
    run += ["--trainer.callbacks.patience_seconds=4"]
    ranks = Ranks(tmp_path)
    ranks.begin("lost", run)
    here, there = ranks.processes
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        while not list((tmp_path / "checkpoints").glob("step=*.ckpt")):
            assert here.poll() is None, ranks.said(0)
            assert there.poll() is None, ranks.said(1)
            assert time.monotonic() < until, ranks.said(0)
            time.sleep(0.05)
        there.send_signal(signal.SIGKILL)
        assert here.wait(timeout=PATIENCE_SECONDS) == 1
    finally:
        ranks.close()
    assert f"process {there.pid}" in ranks.said(0)
    assert "is lost" in ranks.said(0)
