"""Reports on models side by side: quality, size and speed, as text, Markdown and JSON.

Sizes are counted on the loaded modules, independently of cost tables and plans, so that they check
`secateur.pruning.costs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Int
from rich.table import Table
from torch import Tensor, nn

from secateur.pruning.files.model_folder import weight_files
from secateur.pruning.measure.perplexity import MeasuredPerplexity, perplexity
from secateur.pruning.measure.speed import Speed, measure_speed
from secateur.pruning.measure.zero_shot import Question, ZeroShot, zero_shot


@dataclass(frozen=True)
class Counts:
    """Parameters and operations of a loaded model.

    Args:
        parameters: All parameters, tied ones once.
        block_projection_parameters: Weights and biases of the linear layers inside the blocks.
        block_flops_per_token: Forward operations in those layers: 2 per weight, 1 per bias.
        head_flops_per_token: Forward operations in the output head.
        query_width: Query features, summed over all attention layers.
    """

    parameters: int
    block_projection_parameters: int
    block_flops_per_token: int
    head_flops_per_token: int
    query_width: int

    def flops_per_token(self, context_tokens: int) -> int:
        """Forward operations per token: blocks, head, and 4 per query feature and token attended.

        Args:
            context_tokens: Tokens that a query attends to, 0 or more.
        """
        scores = 4 * context_tokens * self.query_width
        return self.block_flops_per_token + self.head_flops_per_token + scores


def count(model: Any) -> Counts:
    """Count a loaded model by walking its modules.

    Args:
        model: A transformers causal language model, on any device, meta included.

    Raises:
        ValueError: It has no blocks with linear layers, or its weights are quantised: packed
            tensors do not show the number of weights.
    """
    blocks = [
        block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module
    ]
    inside = {id(m): m for block in blocks for m in block.modules()}.values()
    linears = [module for module in inside if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError("The model has no list of blocks with nn.Linear layers to count.")
    if any(not linear.weight.is_floating_point() for linear in linears):
        raise ValueError("Quantised weights cannot be counted; load the model in its own dtype.")
    weights = sum(linear.weight.numel() for linear in linears)
    biases = sum(linear.bias.numel() for linear in linears if linear.bias is not None)
    config = model.config
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    # In transformers, attention layers have an index in the cache and a head size.
    attentions = sum(hasattr(m, "layer_idx") and hasattr(m, "head_dim") for m in inside)
    return Counts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        block_projection_parameters=weights + biases,
        block_flops_per_token=2 * weights + biases,
        head_flops_per_token=2 * model.get_output_embeddings().weight.numel(),
        query_width=attentions * config.num_attention_heads * head_size,
    )


def file_bytes(folder: str | Path) -> int:
    """Bytes of the weights in a model folder.

    Raises:
        ValueError: It holds no safetensors weights.
    """
    return sum(file.stat().st_size for file in weight_files(Path(folder)))


@dataclass(frozen=True)
class Row:
    """One model of a report.

    Args:
        name: Its name, such as `dense`.
        perplexity: Text name to perplexity.
        counts: Its sizes.
        speed: Its speed, if it was measured.
        file_bytes: Bytes of its weights on disk, if it is there.
        zero_shot: Task name to accuracy.
    """

    name: str
    perplexity: Mapping[str, MeasuredPerplexity]
    counts: Counts
    speed: Speed | None = None
    file_bytes: int | None = None
    zero_shot: Mapping[str, ZeroShot] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Models side by side; fractions are those of the first one, which is the dense model.

    Args:
        rows: One per model, 1 or more.
        context_tokens: Context that whole-model FLOPs are counted at, 0 or more.
        conditions: How things were measured, such as device and batch size; JSON values.
    """

    rows: Sequence[Row]
    context_tokens: int
    conditions: Mapping[str, Any]

    def table(self) -> Table:
        """The report as a table for a terminal."""
        heading, *rows = self._cells()
        table = Table(caption=self._caption())
        for number, name in enumerate(heading):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The report as Markdown, for a README or model card."""
        heading, *rows = self._cells()
        rule = ["---", *["---:"] * (len(heading) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (heading, rule, *rows)]
        return "\n".join([*lines, "", self._caption(), ""])

    def as_dict(self) -> dict[str, Any]:
        """All figures, with their derived fractions: JSON values only."""
        dense = self.rows[0].counts
        return {
            "conditions": dict(self.conditions),
            "context_tokens": self.context_tokens,
            "models": {
                row.name: asdict(row)
                | {
                    "flops_per_token": row.counts.flops_per_token(self.context_tokens),
                    "kept_block_parameters": row.counts.block_projection_parameters
                    / dense.block_projection_parameters,
                    "kept_block_flops": row.counts.block_flops_per_token
                    / dense.block_flops_per_token,
                    "kept_parameters": row.counts.parameters / dense.parameters,
                    "kept_flops": row.counts.flops_per_token(self.context_tokens)
                    / dense.flops_per_token(self.context_tokens),
                }
                for row in self.rows
            },
        }

    def json(self) -> str:
        """`as_dict` as JSON text."""
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def _cells(self) -> list[list[str]]:
        """One line per figure, one column per model; figures that no model has are left out."""
        figures = self.as_dict()["models"]
        columns = [_cells_of(row, figures[row.name]) for row in self.rows]
        titles = list(dict.fromkeys(title for cells in columns for title in cells))
        return [[title, *(cells.get(title, "") for cells in columns)] for title in titles]

    def _caption(self) -> str:
        conditions = {"context_tokens": self.context_tokens, **self.conditions}
        return ", ".join(f"{name} {value}" for name, value in conditions.items())


def _cells_of(row: Row, figures: Mapping[str, Any]) -> dict[str, str]:
    """Title to cell, in the order of the lines; figures that were not measured are missing."""
    cells = {"model": row.name}
    for text, result in row.perplexity.items():
        cells[f"perplexity {text}"] = f"{result.value:.2f}"
    for task, answers in row.zero_shot.items():
        cells[f"accuracy {task}"] = _with_error(answers.accuracy, answers.accuracy_error)
        cells[f"accuracy {task}, by length"] = _with_error(
            answers.normalised, answers.normalised_error
        )
    cells["parameters"] = f"{row.counts.parameters:,}"
    cells["parameters in blocks"] = f"{row.counts.block_projection_parameters:,}"
    cells["kept in blocks"] = f"{figures['kept_block_parameters']:.4f}"
    cells["FLOPs per token"] = f"{figures['flops_per_token']:.3e}"
    cells["kept FLOPs"] = f"{figures['kept_flops']:.4f}"
    if row.speed is not None:
        cells["prefill, ms"] = f"{row.speed.prefill_seconds * 1e3:.1f}"
        cells["decode, ms per token"] = f"{row.speed.decode_seconds * 1e3:.2f}"
        if row.speed.peak_memory_bytes is not None:
            cells["peak memory, MB"] = f"{row.speed.peak_memory_bytes / 1e6:.0f}"
    if row.file_bytes is not None:
        cells["weights on disk, MB"] = f"{row.file_bytes / 1e6:.2f}"
    return cells


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def measure(
    models: Mapping[str, Any],
    texts: Mapping[str, Int[Tensor, "N T"]],
    folders: Mapping[str, str | Path] | None = None,
    batch_size: int = 8,
    speed: Mapping[str, Any] | None = None,
    tasks: Mapping[str, Sequence[Question]] | None = None,
) -> Report:
    """Measure models side by side; the dense one comes first.

    Args:
        models: Name to causal language model.
        texts: Name to windows of token ids, see `cut_windows`; one or more.
        folders: Name to the folder of a model, for its file size.
        batch_size: Windows per forward pass, 1 or more.
        speed: Settings of `measure_speed` besides its models; None skips this measurement.
        tasks: Name to multiple-choice questions, see `read_questions`; None skips them.

    Raises:
        ValueError: There is no model or no text, or a folder belongs to no model.
    """
    folders = folders or {}
    if not models or not texts:
        raise ValueError(f"A report needs models and texts, got {len(models)} and {len(texts)}.")
    if strange := sorted(set(folders) - set(models)):
        raise ValueError(f"`folders` names {', '.join(strange)}, which `models` does not.")
    speeds = measure_speed(models, **speed) if speed is not None else {}
    rows = [
        Row(
            name=name,
            perplexity={
                text: perplexity(model, windows_NT, batch_size)
                for text, windows_NT in texts.items()
            },
            counts=count(model),
            speed=speeds.get(name),
            file_bytes=file_bytes(folders[name]) if name in folders else None,
            zero_shot={
                task: zero_shot(model, questions) for task, questions in (tasks or {}).items()
            },
        )
        for name, model in models.items()
    ]
    first = next(iter(models.values()))
    device = next(first.parameters()).device.type
    conditions = {"device": device, "dtype": str(first.dtype).removeprefix("torch.")}
    context = max(windows_NT.shape[1] for windows_NT in texts.values())
    return Report(rows, context, conditions | dict(speed or {}))
