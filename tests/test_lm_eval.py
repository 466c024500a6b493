"""The evaluation harness of others reads our folders, and finds what our own measures find."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.measure.zero_shot import log_likelihoods, read_questions, truncate, zero_shot
from secateur.pruning.widths.budget import Budget
from tests.pruning.export.plans import random_plan, uneven_plan
from tests.tiny import SENTENCES, tiny_folder

TASKS = Path(__file__).parents[1] / "docs" / "lm_eval"


def harness(folder: Path, task: str, file: Path, **settings: Any) -> Any:
    """What lm-eval finds for a task of `docs/lm_eval` on a file: its figures, its samples."""
    lm_eval = pytest.importorskip("lm_eval")
    config = yaml.safe_load((TASKS / f"{task}.yaml").read_text())
    config["dataset_kwargs"] = {
        "data_files": {"test": str(file)},
        "cache_dir": str(file.parent / "cache"),
    }
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True, **settings},
        tasks=[config],
        batch_size=8,
        device="cpu",
        bootstrap_iters=1,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )
    return found["results"][task], found["samples"][task]


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def check_choices(folder: Path, file: Path) -> float:
    """Compare accuracies, errors and every log-likelihood; returns the accuracy."""
    theirs, samples = harness(folder, "local_choices", file)
    model, questions = load(folder), read_questions(file, AutoTokenizer.from_pretrained(folder))
    ours = zero_shot(model, questions)
    assert ours.num_questions == len(samples)
    limit = model.config.max_position_embeddings
    endings = [truncate(ending, limit) for question in questions for ending in question.endings]
    scores = [answer for sample in samples for ((answer, _),) in sample["resps"]]
    assert log_likelihoods(model, endings, 16).tolist() == pytest.approx(scores, abs=1e-3)
    assert ours.accuracy == theirs["acc,none"]
    assert ours.normalised == theirs["acc_norm,none"]
    assert ours.accuracy_error == pytest.approx(theirs["acc_stderr,none"])
    assert ours.normalised_error == pytest.approx(theirs["acc_norm_stderr,none"])
    return ours.accuracy


def check_text(folder: Path, file: Path, text: str, length: int) -> float:
    """Compare the perplexity of one document of N windows; returns it."""
    theirs, _ = harness(folder, "local_text", file, max_length=length, add_bos_token=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    # BOS in front; every window begins with the last token of the one before.
    windows_NT = torch.tensor(ids).unfold(0, length + 1, length)
    assert len(ids) - 1 == len(windows_NT) * length > length  # nothing left over
    ours = perplexity(load(folder), windows_NT)
    nats = ours.mean_nll * ours.num_predictions
    assert math.exp(nats / len(text.encode())) == pytest.approx(theirs["byte_perplexity,none"])
    assert math.exp(nats / len(text.split())) == pytest.approx(theirs["word_perplexity,none"])
    return ours.value


def filling(tokenizer: Any, text: str, tokens: int) -> str:
    """The longest beginning of a text, in words, whose tokens are a multiple of a number."""
    words = text.split(" ")
    for count in range(len(words), 0, -1):
        start = " ".join(words[:count])
        if len(tokenizer(start, add_special_tokens=False)["input_ids"]) % tokens == 0:
            return start
    raise AssertionError("no beginning fits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    base = tiny_folder(path / "base")
    prune_checkpoint(base, uneven_plan(base), path / "small")
    return path / "small"


def test_accuracies_agree(folder: Path, tmp_path: Path) -> None:
    draw, words = random.Random(0), " ".join(SENTENCES).split()
    lines = []
    for number in range(40):
        # Some contexts are longer than the 64 positions of the model, some end in a space.
        context = " ".join(draw.choices(words, k=draw.randint(1, 40))) + " " * (number % 5 == 0)
        endings = [" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(3)]
        lines.append({"ctx": context, "endings": endings, "label": draw.randrange(3)})
    check_choices(folder, write_lines(tmp_path / "choices.jsonl", lines))


def test_perplexities_agree(folder: Path, tmp_path: Path) -> None:
    text = filling(AutoTokenizer.from_pretrained(folder), " ".join(SENTENCES * 3), 16)
    check_text(folder, write_lines(tmp_path / "text.jsonl", [{"text": text}]), text, 16)


@pytest.fixture
def halved(data: Path, tmp_path: Path) -> Path:
    """A real model, half of its FLOPs cut at random."""
    base = data / "models" / "llama7m"
    prune_checkpoint(base, random_plan(base, Budget(0.5)), tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.slow
def test_accuracies_of_a_real_model_agree(data: Path, halved: Path, tmp_path: Path) -> None:
    with (data / "tasks" / "arc_easy_test.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in islice(file, 40)]
    accuracy = check_choices(halved, write_lines(tmp_path / "choices.jsonl", lines))
    assert 0 < accuracy < 1


@pytest.mark.slow
def test_perplexities_of_a_real_model_agree(data: Path, halved: Path, tmp_path: Path) -> None:
    text = (data / "text" / "tinystories_val.txt").read_text(encoding="utf-8")[:6_000]
    text = filling(AutoTokenizer.from_pretrained(halved), text, 256)
    check_text(halved, write_lines(tmp_path / "text.jsonl", [{"text": text}]), text, 256)
