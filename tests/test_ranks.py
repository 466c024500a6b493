"""Two ranks of one machine, on the CPU with gloo, under every strategy, through both phases."""

from __future__ import annotations

import json
import os
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.pruning.plan import Plan
from tests.ranks import finish, start, trained
from tests.runs import NOISE, call, content, learn_masks, make_inputs, on_text, with_callbacks

pytestmark = [*NOISE, pytest.mark.slow]
STEPS = 6
CALLBACKS = ("AnnealSparsity", "TrackBudget", "PlotWidths", "SaveCheckpoint", "WatchRanks")
CLIPPED = ("--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.05")
PACKED = {"four": ("FourBit", "ddp"), "eight": ("EightBit", "zero2")}
STRATEGIES = {
    "ddp": "auto",
    "zero1": "{class_path: Zero, init_args: {stage: 1}}",
    "zero2": "{class_path: Zero, init_args: {stage: 2, offload_optimizer: true}}",
    "zero3": "{class_path: Zero, init_args: {stage: 3}}",
    "offloaded": "{class_path: Zero, init_args: {offload_parameters: true}}",
    "fsdp": "{class_path: ShardedDDP}",
}


class Malice:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def on_one(folder: Path, name: str, *settings: str) -> list[str]:
    """A run on one rank whose batches are those of two."""
    run = learn_masks(folder, folder / name, STEPS, CALLBACKS[:4])
    return [*run, "--data.batch_size=8", "--trainer.logger=false", *settings]


def on_two(folder: Path, name: str, strategy: str, *settings: str) -> list[str]:
    callbacks = [*CALLBACKS, "ExportModel"] if name == "zero3" else [*CALLBACKS]
    run = learn_masks(folder, folder / name, STEPS, callbacks)
    return [
        *run,
        "--trainer.logger=false",
        "--trainer.devices=2",
        f"--trainer.strategy={STRATEGIES[strategy]}",
        *settings,
    ]


RECOVERY = {
    "full": ("--model.gradient_checkpointing=true",),
    "lora": ("--model.lora.rank=3", "--model.lora.dropout=0"),
    "half": ("--model.dtype=bfloat16",),
}


def recovery(folder: Path, name: str, strategy: str | None, *settings: str) -> list[str]:
    """Training of a model's own weights, on two ranks, or on one with the batches of two."""
    run = [
        "fit",
        "--model=CausalLM",
        f"--model.base={folder / 'wide' / 'base'}",
        "--model.loss.distillation=1",
        "--model.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 1.0e-4}}",
        "--model.warmup_steps=1",
        *on_text(folder / "wide", folder / name),
        *settings,
        *with_callbacks(["SaveCheckpoint", "ExportModel"]),
        *("--trainer.max_steps=4", "--trainer.logger=false", "--trainer.limit_val_batches=1"),
    ]
    if strategy is None:
        return [*run, "--data.batch_size=8"]
    return [*run, "--trainer.devices=2", f"--trainer.strategy={STRATEGIES[strategy]}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a run on one rank, and of all runs on two."""
    folder = make_inputs(tmp_path_factory.mktemp("ranks"), tie_word_embeddings=True)
    one = call(on_one(folder, "one", "--trainer.val_check_interval=3"))
    torch.save(trained(one.model), folder / "one.0.pt")
    alone = {"one_clipped": CLIPPED} | {
        f"one_{name}": (f"--model.quantisation={kind}",) for name, (kind, _) in PACKED.items()
    }
    for name, settings in alone.items():
        run = call(on_one(folder, name, *settings))
        torch.save(trained(run.model), folder / f"{name}.0.pt")
    torch.save({"x": Malice(folder / "executed")}, folder / "malice.ckpt")
    half = folder / "one" / "checkpoints" / "step=3.ckpt"
    all_runs = {name: on_two(folder, name, name) for name in STRATEGIES}
    all_runs["zero3"].append("--trainer.val_check_interval=3")
    all_runs["resumed"] = on_two(
        folder,
        "resumed",
        "zero3",
        f"--ckpt_path={folder / 'zero3' / 'checkpoints' / 'step=3.ckpt'}",
    )
    all_runs["from_one"] = on_two(folder, "from_one", "zero2", f"--ckpt_path={half}")
    all_runs["checkpointed"] = on_two(
        folder, "checkpointed", "zero3", "--model.gradient_checkpointing=true"
    )
    for stage in ("zero2", "zero3"):
        all_runs[f"clipped_{stage}"] = on_two(folder, f"clipped_{stage}", stage, *CLIPPED)
    for name, (kind, strategy) in PACKED.items():
        packed = f"--model.quantisation={kind}"
        all_runs[name] = on_two(folder, name, strategy, packed)
    # Heads that DeepSpeed would not keep whole by itself, and a checkpoint before which nothing has
    # gathered them: from the third step on it expects parameters in an order that it has noted.
    make_inputs(folder / "wide", hidden_size=336, intermediate_size=1024)
    all_runs["saved"] = [
        *learn_masks(folder / "wide", folder / "saved", 4, ("SaveCheckpoint",), 3),
        *("--trainer.logger=false", "--trainer.limit_val_batches=0", "--trainer.devices=2"),
        f"--trainer.strategy={STRATEGIES['zero3']}",
    ]
    all_runs["recovered"] = recovery(folder, "recovered", "zero2")
    all_runs["sparse"] = recovery(
        folder,
        "sparse",
        "ddp",
        "--trainer.callbacks+=PruneWeights",
        "--trainer.callbacks.pattern=NM",
        *("--trainer.callbacks.pattern.n=2", "--trainer.callbacks.pattern.m=4"),
        *("--trainer.callbacks.calibration_windows=8", "--trainer.callbacks.held_back_windows=4"),
    )
    for name, settings in RECOVERY.items():
        all_runs[name] = recovery(folder, name, "zero3", *settings)
    at = f"--ckpt_path={folder / 'half' / 'checkpoints' / 'step=3.ckpt'}"
    all_runs["half_resumed"] = recovery(folder, "half_resumed", "zero3", *RECOVERY["half"], at)
    all_runs["refused_malice"] = on_two(
        folder, "refused_malice", "zero3", f"--ckpt_path={folder / 'malice.ckpt'}"
    )
    finish(folder, start(folder, all_runs), timeout=400)
    return folder


def state(folder: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=True)


@pytest.mark.parametrize(
    ("name", "opponent"),
    [(name, "one") for name in (*STRATEGIES, "from_one", "checkpointed")]
    + [("clipped_zero2", "one_clipped"), ("clipped_zero3", "one_clipped")]
    + [(name, f"one_{name}") for name in PACKED],
)
def test_two_ranks_learn_what_one_learns(runs: Path, name: str, opponent: str) -> None:
    here, there, one = state(runs, name), state(runs, name, 1), state(runs, opponent)
    assert here.keys() == one.keys()
    # Kernels of packed weights sum in an order that depends on the number of windows.
    atol = 5e-5 if name in PACKED else 1e-5
    for key, value in one.items():
        assert torch.equal(here[key], there[key]), key  # bitwise, on all ranks
        torch.testing.assert_close(here[key], value, atol=atol, rtol=0)
    assert bool((one["gains"] != 1).any())  # both phases ran


def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(runs: Path) -> None:
    for key, value in state(runs, "zero3").items():
        assert torch.equal(state(runs, "resumed")[key], value), key


def test_training_goes_on_after_a_checkpoint(runs: Path) -> None:
    assert max(value.numel() for value in state(runs, "saved").values()) > 100_000
    names = {path.name for path in (runs / "saved" / "checkpoints").iterdir()}
    assert names == {"step=3.ckpt", "step=4.ckpt"}


@pytest.mark.parametrize("name", ["recovered", "sparse"])
def test_two_ranks_train_one_model(runs: Path, name: str) -> None:
    here, there = state(runs, name), state(runs, name, 1)
    exported = load_file(runs / name / "model" / "model.safetensors")
    for key, value in here.items():
        assert torch.equal(value, there[key]), key
        assert torch.equal(value, exported.get(key.removeprefix("model."), value)), key
    zeros = {key for key, value in exported.items() if (value == 0).float().mean() == 0.5}
    assert len(zeros) == (7 * 3 if name == "sparse" else 0)


def saved(folder: Path) -> dict[str, Any]:
    """The last checkpoint of a recovery."""
    found: dict[str, Any] = torch.load(folder / "checkpoints" / "step=4.ckpt", weights_only=True)
    return found


@pytest.mark.parametrize("name", ["full", "lora"])
def test_weights_that_ranks_divide_become_what_one_rank_makes_of_them(
    runs: Path, name: str, tmp_path: Path
) -> None:
    at = runs / name / "checkpoints" / "step=3.ckpt"
    call(recovery(runs, str(tmp_path / "one"), None, *RECOVERY[name]))
    call(recovery(runs, str(tmp_path / "more"), None, *RECOVERY[name], f"--ckpt_path={at}"))
    one = saved(tmp_path / "one")
    assert max(weight.numel() for weight in one["state_dict"].values()) > 100_000 or name == "lora"
    for other in (runs / name, tmp_path / "more"):
        found = saved(other)
        assert found["state_dict"].keys() == one["state_dict"].keys()
        for key, value in one["state_dict"].items():
            torch.testing.assert_close(found["state_dict"][key], value, atol=1e-5, rtol=0)
        assert (
            found["optimizer_states"][0]["param_groups"]
            == one["optimizer_states"][0]["param_groups"]
        )

    ours, theirs = content(runs / name / "model"), content(tmp_path / "one" / "model")
    assert ours.keys() == theirs.keys()
    told = {"model.safetensors", "secateur.json", "README.md"}  # what they weigh, measure and say
    assert {file: ours[file] for file in ours.keys() - told} == {
        file: theirs[file] for file in theirs.keys() - told
    }
    weights = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for key, value in load_file(runs / name / "model" / "model.safetensors").items():
        torch.testing.assert_close(weights.pop(key), value, atol=1e-5, rtol=0)
    assert not weights
    reports = (
        json.loads((folder / "report.json").read_text())
        for folder in (runs / name, tmp_path / "one")
    )
    mine, one_rank = (
        report["models"]["trained"]["perplexity"]["validation"]["value"] for report in reports
    )
    assert mine == pytest.approx(one_rank, rel=1e-4)


def test_divided_weights_of_a_narrow_type_go_on_bit_for_bit(runs: Path) -> None:
    """Their float32 copies, which the optimiser steps, come from the checkpoint."""
    half, resumed = (saved(runs / name)["state_dict"] for name in ("half", "half_resumed"))
    assert {value.dtype for value in half.values()} == {torch.float32}
    for key, value in half.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_a_run_of_two_ranks_goes_on_with_one(runs: Path, name: str, tmp_path: Path) -> None:
    half = runs / name / "checkpoints" / "step=3.ckpt"
    arguments = on_one(runs, str(tmp_path / "run"), f"--ckpt_path={half}")
    for key, value in trained(call(arguments).model).items():
        torch.testing.assert_close(value, state(runs, "one")[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_does_not_tell_how_many_ranks_wrote_it(runs: Path, name: str) -> None:
    mine, one = (
        torch.load(runs / run / "checkpoints" / "step=6.ckpt", weights_only=True)
        for run in (name, "one")
    )
    assert mine["state_dict"].keys() == one["state_dict"].keys()
    assert not any(key.startswith("model.") for key in mine["state_dict"])
    ours, theirs = mine["optimizer_states"][0], one["optimizer_states"][0]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, of_parameter in theirs["state"].items():
        for key, value in of_parameter.items():
            torch.testing.assert_close(ours["state"][number][key], value, atol=1e-5, rtol=0)


def test_a_divided_model_is_exported_and_proven(runs: Path) -> None:
    plan, one = Plan.load(runs / "zero3" / "plan"), state(runs, "one")
    assert plan.provenance["step"] == STEPS
    assert plan.gains is not None
    assert sum(map(len, plan.gains.values())) == one["gains"].numel()
    assert {"README.md", "model.safetensors", "plan/plan.json"} <= content(
        runs / "zero3" / "model"
    ).keys()
    assert "ranks 2" in (runs / "zero3" / "report.md").read_text(encoding="utf-8")


def test_a_malicious_checkpoint_does_not_run(runs: Path) -> None:
    assert zipfile.is_zipfile(runs / "malice.ckpt")
    assert not (runs / "executed").exists()
    for rank in (0, 1):
        assert "weights_only" in (runs / f"refused_malice.{rank}.txt").read_text(encoding="utf-8")


def test_a_lost_rank_ends_the_other_with_its_name(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    run = [*on_two(tmp_path, "lost", "ddp"), "--trainer.callbacks.patience_seconds=4"]
    run += ["--trainer.max_steps=100000"]
    ranks = start(tmp_path, {"lost": run})
    deadline = time.monotonic() + 200
    try:
        while not list((tmp_path / "lost" / "checkpoints").glob("step=*.ckpt")):
            assert all(rank.poll() is None for rank in ranks), (tmp_path / "rank0.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGKILL)
        assert ranks[0].wait(timeout=60) == 1
    finally:
        for rank in ranks:
            rank.kill()
    said = (tmp_path / "rank0.log").read_text(encoding="utf-8")
    assert f"process {ranks[1].pid}" in said
    assert "is lost" in said
