from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secateur.pruning.depth import BlockScores, HalfBlocks, Unit, WholeBlocks
from secateur.pruning.depth.plots import plot_scores


def drawn(
    scores: BlockScores, removed: list[Unit], path: Path, monkeypatch: pytest.MonkeyPatch
) -> Axes:
    """The axes of the picture that is written."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_scores(scores, path, removed)
    assert path.read_bytes().startswith(b"\x89PNG")
    return figures[0].axes[0]


def test_scores_are_drawn_with_errors_and_removed_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, errors = torch.tensor([900.0, 30, 20, 25]).double(), torch.ones(4).double()
    scores = BlockScores(values, errors, WholeBlocks().all(4))
    axes = drawn(scores, [Unit(2)], tmp_path / "new" / "scores.png", monkeypatch)
    found = {
        container.get_label(): list(container.lines[0].get_xydata()[:, 0])
        for container in axes.containers
    }
    assert found == {"stays": [1, 3], "removed": [2]}
    (far,) = axes.texts  # 900 would leave no room to tell the others apart
    assert (far.get_text(), far.get_position()) == ("900", (0, -30))
    assert axes.get_ylim()[1] < 50
    assert "standard error" in axes.get_ylabel()


def test_halves_without_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = BlockScores(torch.tensor([-1.0, 2, 3, 4]).double(), None, HalfBlocks().all(2))
    axes = drawn(scores, [], tmp_path / "scores.png", monkeypatch)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["0.attn", "0.mlp", "1.attn", "1.mlp"]
    assert (axes.get_yscale(), axes.get_ylabel()) == ("linear", "score")
