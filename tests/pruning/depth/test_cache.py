from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.pruning.depth import (
    AngularDistance,
    BlockMagnitude,
    Blocks,
    BlockScores,
    Cached,
    Greedy,
    OneShot,
    Perplexity,
    remove_blocks,
)
from secateur.pruning.depth.cache import load_scores
from secateur.pruning.files.fingerprint import live_fingerprint
from tests.tiny import VOCABULARY, tiny_llama


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def same(a: BlockScores, b: BlockScores) -> bool:
    pairs = ((a.values, b.values), (a.errors, b.errors), (a.runs, b.runs))
    return a.units == b.units and all(
        x is y if x is None or y is None else torch.equal(x.nan_to_num(9), y.nan_to_num(9))
        for x, y in pairs
    )


@pytest.mark.parametrize("score", [Perplexity(), AngularDistance(), BlockMagnitude()])
def test_what_is_read_is_what_was_computed(
    score: Perplexity | AngularDistance | BlockMagnitude,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, windows_NT = tiny_llama(), tokens(3, 8)
    cached = Cached(score, tmp_path / "scores")
    first = cached(model, windows_NT)
    assert same(first, score(model, windows_NT))
    monkeypatch.delattr(type(score), "_score")  # a second computation would fail
    monkeypatch.setattr(type(score), "__abstractmethods__", frozenset())
    assert same(cached(model, windows_NT), first)
    (table,) = (tmp_path / "scores").glob("*.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["unit"] for row in rows] == ["0", "1", "2"]
    assert [float(row["score"]) for row in rows] == first.values.tolist()


def test_every_dependence_is_in_the_key(tmp_path: Path) -> None:
    model, windows_NT = tiny_llama(num_hidden_layers=4), tokens(3, 8)

    def results() -> int:
        return len(list(tmp_path.glob("*.json")))

    Cached(Perplexity(), tmp_path)(model, windows_NT)
    Cached(Perplexity(), tmp_path)(model, windows_NT)
    assert results() == 1
    Cached(Perplexity(4), tmp_path)(model, windows_NT)  # settings
    assert results() == 2
    Cached(Perplexity(), tmp_path)(model, windows_NT[:2])  # text
    assert results() == 3
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6  # weights
    Cached(Perplexity(), tmp_path)(model, windows_NT)
    assert results() == 4
    remove_blocks(model, [1])
    Cached(Perplexity(), tmp_path)(model, windows_NT)
    assert results() == 5
    for text in (windows_NT, windows_NT[:2], None):  # what is not read is no dependence
        Cached(BlockMagnitude(), tmp_path)(model, text)
    assert results() == 6


def test_searches_go_on_from_the_scores_of_earlier_ones(tmp_path: Path) -> None:
    model, windows_NT = tiny_llama(num_hidden_layers=5), tokens(3, 8)
    score = Cached(Perplexity(), tmp_path)
    two = Greedy(score)(model, windows_NT, Blocks(2))
    before = set(tmp_path.iterdir())
    assert len(before) == 2 * 2
    assert OneShot(score)(model, windows_NT, Blocks(3)).scores.units == two.scores.units
    assert set(tmp_path.iterdir()) == before
    three = Greedy(score)(model, windows_NT, Blocks(3))
    assert three.removed[:2] == two.removed
    assert len(set(tmp_path.iterdir()) - before) == 2


def test_a_fingerprint_is_of_content() -> None:
    assert live_fingerprint(tiny_llama()) == live_fingerprint(tiny_llama())
    assert live_fingerprint(tiny_llama()) != live_fingerprint(tiny_llama(1))
    assert live_fingerprint(tiny_llama()) != live_fingerprint(tiny_llama(rms_norm_eps=1e-3))
    assert live_fingerprint(tiny_llama().bfloat16()) != live_fingerprint(tiny_llama())


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"units": []}'])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=r"scores\.json holds no readable scores"):
        load_scores(tmp_path / "scores.json")
