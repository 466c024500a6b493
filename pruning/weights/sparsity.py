"""Achieved sparsity: zeros per matrix, block and model, and matrices that suit a 2:4 kernel.

Everything is counted on masks and shapes of the model, independently of the recipe.

Legend: O = output features, I = input features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.blocks.linears import linears_of
from secateur.pruning.families import family_of
from secateur.pruning.weights.masks import WeightMasks

# The 2:4 kernels of torch need shapes that are multiples of these in half precision.
KERNEL_ROWS, KERNEL_COLUMNS = 32, 64


def fits_2of4(mask_OI: Bool[Tensor, "O I"]) -> bool:
    """Test whether a 2:4 kernel can use a matrix, by its zeros along the inputs and its shape."""
    rows, columns = mask_OI.shape
    if rows % KERNEL_ROWS or columns % KERNEL_COLUMNS:
        return False
    return bool((mask_OI.view(rows, -1, 4).sum(2) <= 2).all())


@dataclass(frozen=True)
class MatrixZeros:
    """The zeros of one matrix.

    Args:
        block: Number of its block.
        path: Module, relative to the block.
        entries: Number of weights.
        removed: Number of removed weights.
        fits_2of4: Whether a 2:4 kernel can use it.
    """

    block: int
    path: str
    entries: int
    removed: int
    fits_2of4: bool

    @property
    def sparsity(self) -> float:
        """Fraction removed, in [0, 1]."""
        return self.removed / self.entries


@dataclass(frozen=True)
class SparsityReport:
    """The zeros of a model.

    Args:
        matrices: Every linear layer of every block, pruned or not.
        parameters: Parameters of the whole model, tied ones once.
        notes: Deviations from the recipe.
    """

    matrices: Sequence[MatrixZeros]
    parameters: int
    notes: Sequence[str] = ()

    @property
    def block_sparsities(self) -> list[float]:
        """Fraction removed of the linear layers of every block."""
        blocks: dict[int, list[MatrixZeros]] = {}
        for matrix in self.matrices:
            blocks.setdefault(matrix.block, []).append(matrix)
        return [_sparsity(blocks[block]) for block in sorted(blocks)]

    @property
    def linear_sparsity(self) -> float:
        """Fraction removed of all linear layers of all blocks."""
        return _sparsity(self.matrices)

    @property
    def pruned_sparsity(self) -> float:
        """Fraction removed of the matrices that were pruned."""
        return _sparsity([matrix for matrix in self.matrices if matrix.removed])

    @property
    def model_sparsity(self) -> float:
        """Fraction removed of all parameters."""
        return sum(matrix.removed for matrix in self.matrices) / self.parameters

    def describe(self) -> str:
        """A text table: one row per kind of matrix, one column per block, then the totals."""
        paths = list(dict.fromkeys(matrix.path for matrix in self.matrices))
        cells = {(matrix.path, matrix.block): matrix for matrix in self.matrices}
        blocks = sorted({matrix.block for matrix in self.matrices})
        rows = [["removed", *(f"block {block}" for block in blocks)]]
        for path in paths:
            own = [cells.get((path, block)) for block in blocks]
            rows.append([path, *(f"{m.sparsity:.4f}{'*' * m.fits_2of4}" if m else "" for m in own)])
        rows.append(["block", *(f"{sparsity:.4f}" for sparsity in self.block_sparsities)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        fitting = sum(matrix.fits_2of4 for matrix in self.matrices)
        lines.append(
            f"Removed: {self.pruned_sparsity:.4f} of the matrices that were pruned, "
            f"{self.linear_sparsity:.4f} of the linear layers of the blocks, "
            f"{self.model_sparsity:.4f} of all parameters."
        )
        lines.append(
            f"A 2:4 kernel can use {fitting} of {len(self.matrices)} matrices (*); elsewhere zeros "
            "save neither time nor memory."
        )
        return "\n".join([*lines, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """All figures, JSON values only."""
        return {
            "linear_sparsity": self.linear_sparsity,
            "pruned_sparsity": self.pruned_sparsity,
            "model_sparsity": self.model_sparsity,
            "block_sparsities": self.block_sparsities,
            "matrix_sparsities": {f"{m.block}.{m.path}": m.sparsity for m in self.matrices},
            "fits_2of4": [f"{m.block}.{m.path}" for m in self.matrices if m.fits_2of4],
            "notes": list(self.notes),
        }

    def save(self, folder: Path) -> None:
        """Write `sparsity.txt`, `sparsity.json` and `sparsity.png` into a folder that exists."""
        (folder / "sparsity.txt").write_text(self.describe() + "\n", encoding="utf-8")
        text = json.dumps(self.as_dict(), indent=1) + "\n"
        (folder / "sparsity.json").write_text(text, encoding="utf-8")
        plot_sparsity(self, folder / "sparsity.png")


def sparsity_report(
    model: PreTrainedModel, masks: WeightMasks, notes: Sequence[str] = ()
) -> SparsityReport:
    """Count the zeros of masks.

    Args:
        model: The model, live or on the meta device; only its shapes are read.
        masks: The masks.
        notes: Deviations from the recipe.
    """
    prefix = family_of(model.config).blocks
    matrices = []
    for linear in (linear for block in linears_of(model) for linear in block):
        name = f"{prefix}.{linear.name}.weight"
        entries = linear.shape[0] * linear.shape[1]
        if name not in masks:
            matrices.append(MatrixZeros(linear.block, linear.path, entries, 0, False))
            continue
        mask_OI = masks[name]
        removed = entries - int(mask_OI.sum())
        fits = fits_2of4(mask_OI)
        matrices.append(MatrixZeros(linear.block, linear.path, entries, removed, fits))
    return SparsityReport(matrices, sum(p.numel() for p in model.parameters()), notes)


def plot_sparsity(report: SparsityReport, path: Path) -> None:
    """Write a PNG of the fraction removed of every matrix, block by block.

    Args:
        report: The achieved sparsity.
        path: The file to write; its folder is created if needed.
    """
    paths = list(dict.fromkeys(matrix.path for matrix in report.matrices))
    blocks = sorted({matrix.block for matrix in report.matrices})
    cells = {(matrix.path, matrix.block): matrix for matrix in report.matrices}
    figure = Figure(figsize=(max(5.0, 2.5 + 0.45 * len(blocks)), 1.5 + 0.4 * len(paths)))
    axes = figure.add_subplot()
    removed = [
        [cells[name, block].sparsity if (name, block) in cells else math.nan for block in blocks]
        for name in paths
    ]
    image = axes.imshow(removed, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, name in enumerate(paths):
        for column, block in enumerate(blocks):
            if (matrix := cells.get((name, block))) is None:
                continue
            axes.text(
                column, row, f"{matrix.sparsity:.2f}"[1:] + "*" * matrix.fits_2of4,
                ha="center", va="center", fontsize=7,
                color="black" if matrix.sparsity > 0.6 else "white",
            )  # fmt: skip
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(paths)), paths)
    axes.set_xlabel("block (* a 2:4 kernel can use the matrix)")
    axes.set_title(f"Removed: {report.linear_sparsity:.1%} of the linear layers")
    figure.colorbar(image, label="fraction removed")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _sparsity(matrices: Sequence[MatrixZeros]) -> float:
    entries = sum(matrix.entries for matrix in matrices)
    return sum(matrix.removed for matrix in matrices) / entries if entries else 0.0
