"""Runs on a real SLURM of two nodes: preempted, cancelled, left by a node, resumed on other ranks.

`make test-cluster` installs what is needed and runs this file; its name keeps it out of
`make test`, which needs neither root nor SLURM. Jobs are those of slurm/train.sbatch: one rank per
node, on the CPU, under ZeRO-3.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from secateur.pruning.files.checkpoints import FOLDER
from secateur.pruning.plan import Plan
from tests.cluster.cluster import Cluster
from tests.runs import content, from_open_gates, learn_masks, make_inputs

REPOSITORY = Path(__file__).parents[2]
CALLBACKS = ("AnnealSparsity", "ExportModel", "SaveCheckpoint")
STORIES_260K = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
STEPS, EVERY = 60, 5
LAUNCH = 900  # seconds that a job may take, on a busy machine, to reach what is waited for


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), **STORIES_260K)


@dataclass
class Training:
    """A run of slurm/train.sbatch, over all its launches."""

    cluster: Cluster
    inputs: Path
    root: Path
    job: str = ""

    def submit(self, nodes: int = 2) -> None:
        """Submit it, with what differs here from a cluster of GPUs."""
        self.root.mkdir(exist_ok=True)
        run = learn_masks(self.inputs, self.root, STEPS, CALLBACKS, EVERY)
        arguments = from_open_gates(run)[1:]
        self.job = self.cluster.submit(
            *(f"--nodes={nodes}", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"),
            *("--time=60", f"--output={self.log}", f"--chdir={REPOSITORY}"),
            "--export=ALL,MASTER_ADDR=127.0.0.1",
            REPOSITORY / "slurm" / "train.sbatch",
            *arguments,
            *("--trainer.logger=false", "--trainer.strategy=Zero"),
            "--trainer.strategy.stage=3",
        )

    @property
    def log(self) -> Path:
        return self.root / "job.log"

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def state(self) -> str:
        return self.cluster.show(self.job)["JobState"]

    def reach(self, step: int) -> None:
        """Wait for a checkpoint of a step or a later one."""

        def reached() -> bool:
            assert self.state() not in ("FAILED", "COMPLETED"), self.said
            found = (self.root / FOLDER).glob("step=*.ckpt")
            return any(int(path.stem.removeprefix("step=")) >= step for path in found)

        self.cluster.wait(f"step {step}\n{self.said}", reached, LAUNCH)

    def end(self, *states: str) -> None:
        """Wait until the job has come to its end, and check which."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.cluster.wait("the end of the job", lambda: self.state() in over, LAUNCH)
        assert self.state() in (states or ("COMPLETED",)), self.said

    def resumed_from(self) -> list[int]:
        """The steps from which launches went on, as the log says it."""
        return [int(step) for step in re.findall(r"Resuming from .*/step=(\d+)\.ckpt", self.said)]

    def results(self) -> dict[str, bytes]:
        """Plan and model; of the model, all but what quotes the command, with its output folder."""
        files = {f"plan/{name}": data for name, data in content(self.root / "plan").items()}
        files |= {f"model/{name}": data for name, data in content(self.root / "model").items()}
        assert {"plan/plan.safetensors", "model/model.safetensors"} <= files.keys()
        for quotes in ("README.md", "secateur.json"):
            del files[f"model/{quotes}"]
        return files


@pytest.fixture(scope="module")
def whole(cluster: Cluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run that nobody disturbs."""
    run = Training(cluster, inputs, tmp_path_factory.mktemp("whole"))
    run.submit()
    run.end()
    assert run.resumed_from() == []
    return run


@pytest.fixture
def run(cluster: Cluster, inputs: Path, tmp_path: Path) -> Iterator[Training]:
    """A run to be disturbed; whatever is left of it is cancelled."""
    run = Training(cluster, inputs, tmp_path / "run")
    yield run
    cluster.call("scancel", "--full", run.job)


def test_a_run_that_is_preempted_twice_ends_as_an_undisturbed_one(
    run: Training, whole: Training
) -> None:
    run.submit()
    run.reach(EVERY)
    run.cluster.call("scancel", "--signal=USR1", run.job)  # as --signal=USR1@600 does in its time
    run.reach(7 * EVERY)
    urgent = run.cluster.submit(
        "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true"
    )
    run.end()
    assert run.cluster.show(urgent)["JobState"] == "COMPLETED"
    assert run.said.count(f"Job {run.job} is requeued and will resume from there.") == 2
    first, second = run.resumed_from()
    assert EVERY <= first < second < STEPS
    assert run.results() == whole.results()


def test_a_run_that_is_signalled_while_it_starts_and_then_loses_a_node_ends_as_well(
    run: Training, whole: Training
) -> None:
    run.submit()
    run.cluster.wait("both ranks", lambda: run.said.count("Seed set to 0") == 2, LAUNCH)
    run.cluster.call("scancel", "--signal=TERM", run.job)  # waits for the first step
    run.reach(2 * EVERY)
    run.cluster.lose_node("n2")
    run.cluster.wait("a requeue", lambda: int(run.cluster.show(run.job)["Restarts"]) > 1, LAUNCH)
    run.cluster.start_node("n2")
    run.end()
    # When the node is back, SLURM may deliver to the new launch what was to end the lost one.
    first, second, *_ = run.resumed_from()
    assert first == 1
    assert second % EVERY == 0
    assert second >= 2 * EVERY
    assert run.results() == whole.results()


def test_a_cancelled_run_stays_cancelled_and_goes_on_with_other_ranks(run: Training) -> None:
    """From two ranks to one and back to two."""
    for number, nodes in enumerate((2, 1), 1):
        run.submit(nodes)
        run.reach(number * 4 * EVERY)
        run.cluster.call("scancel", run.job)
        run.end("CANCELLED")
        assert run.cluster.show(run.job)["Restarts"] == "0"
    run.submit(2)
    run.end()
    first, second = run.resumed_from()
    assert 4 * EVERY <= first < second < STEPS
    assert Plan.load(run.root / "plan").provenance["step"] == STEPS


def test_a_run_that_fails_by_itself_is_not_requeued(run: Training) -> None:
    """Nor is one whose memory ran out, which would run out again: SIGKILL of a rank looks alike."""
    (run.root / FOLDER).mkdir(parents=True)
    (run.root / FOLDER / "step=5.ckpt").write_bytes(b"no checkpoint")
    run.submit()
    run.end("FAILED")
    assert "All 1 checkpoints" in run.said
    assert run.cluster.show(run.job)["Restarts"] == "0"


def test_the_script_is_told_where_to_be_submitted(cluster: Cluster, tmp_path: Path) -> None:
    """And it has no mistake that bash can find."""
    script = REPOSITORY / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(
        ["bash", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "submit from the folder of the repository" in done.stderr
