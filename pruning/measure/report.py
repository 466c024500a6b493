"""Reports on models side by side: quality, size and speed, as text, Markdown and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from secateur.pruning.measure.generation import Prompt, generate
from secateur.pruning.measure.latency_table import PHASES, LatencyTable
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.measure.row import Row
from secateur.pruning.measure.sizes import count, file_bytes, memory_bytes, zero_fraction
from secateur.pruning.measure.speed import Speed, measure_speed
from secateur.pruning.measure.verdict import Grade, Verdict, judge
from secateur.pruning.measure.zero_shot import Question, zero_shot
from secateur.pruning.progress import part

_SIDE_BY_SIDE = 4  # columns of models that fit a terminal
_IN_BRIEF = ("model", "perplexity", "excess", "kept in blocks", "prefill", "decode")


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

    def verdicts(self) -> dict[str, Verdict]:
        """What every model but the dense one comes to, by its name."""
        dense, *others = self.rows
        return {row.name: judge(dense, row, self.context_tokens) for row in others}

    def untimed(self) -> Report:
        """The same without times, which differ from run to run."""
        rows = [replace(row, speed=None, predicted_seconds={}) for row in self.rows]
        return replace(self, rows=rows)

    def table(self) -> Table:
        """The report as a table for a terminal, a column per model; more than four models have a
        line each, with quality, kept fraction and times only.
        """
        lines = self.cells()
        if len(self.rows) > _SIDE_BY_SIDE:
            brief = [line for line in lines if line[0].startswith(_IN_BRIEF)]
            lines = [list(line) for line in zip(*brief, strict=True)]
        heading, *rows = lines
        table = Table(caption=self.caption())
        for number, name in enumerate(heading):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def show(self, console: Console) -> None:
        """Print table and verdicts."""
        console.print(self.table())
        for verdict in self.verdicts().values():
            console.print(verdict.text, style="red" if verdict.grade is Grade.COLLAPSED else "")

    def markdown(self) -> str:
        """The report as Markdown, for a README or model card."""
        heading, *rows = self.cells()
        rule = ["---", *["---:"] * (len(heading) - 1)]
        table = ["| " + " | ".join(row) + " |" for row in (heading, rule, *rows)]
        told = [line for verdict in self.verdicts().values() for line in (verdict.text, "")]
        return "\n".join([*told, *table, "", self.caption(), ""])

    def as_dict(self) -> dict[str, Any]:
        """All figures, with their derived fractions: JSON values only."""
        dense = self.rows[0].counts
        return {
            "conditions": dict(self.conditions),
            "context_tokens": self.context_tokens,
            "verdicts": {
                name: {"grade": verdict.grade.value, "text": verdict.text}
                for name, verdict in self.verdicts().items()
            },
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

    def cells(self) -> list[list[str]]:
        """One line per figure, one column per model; figures that no model has are left out."""
        figures = self.as_dict()["models"]
        columns = [self._cells_of(row, figures[row.name]) for row in self.rows]
        titles = list(dict.fromkeys(title for cells in columns for title in cells))
        return [[title, *(cells.get(title, "") for cells in columns)] for title in titles]

    def caption(self) -> str:
        """Under which conditions it was measured, in one line."""
        conditions = {"context_tokens": self.context_tokens, **self.conditions}
        lengths = {
            f"predicted tokens of {text}": f"{found.num_predictions:,}"
            for text, found in self.rows[0].perplexity.items()
        }
        return ", ".join(f"{name} {value}" for name, value in (lengths | conditions).items())

    def _cells_of(self, row: Row, figures: Mapping[str, Any]) -> dict[str, str]:
        """Title to cell, in the order of the lines; what was not measured is missing."""
        cells = {"model": row.name}
        for text, result in row.perplexity.items():
            cells[f"perplexity {text}"] = f"{result.value:.2f}"
            lost = result.mean_nll - self.rows[0].perplexity[text].mean_nll
            cells[f"excess {text}, nats"] = "" if row is self.rows[0] else f"{lost:+.3f}"
        for task, answers in row.zero_shot.items():
            cells[f"accuracy {task}"] = _with_error(answers.accuracy, answers.accuracy_error)
            cells[f"accuracy {task}, by length"] = _with_error(
                answers.normalised, answers.normalised_error
            )
        if row.generation is not None:
            broken = ", broken: it loops" if row.generation.broken else ""
            cells["repetition in answers"] = f"{row.generation.repetition:.2f}{broken}"
        cells["parameters"] = f"{row.counts.parameters:,}"
        cells["parameters in blocks"] = f"{row.counts.block_projection_parameters:,}"
        cells["kept in blocks"] = f"{figures['kept_block_parameters']:.4f}"
        at = f"at {self.context_tokens} tokens"
        cells[f"FLOPs per token {at}"] = f"{figures['flops_per_token']:.3e}"
        cells[f"kept FLOPs {at}"] = f"{figures['kept_flops']:.4f}"
        if row.zeros is not None:
            cells["zeros in blocks"] = f"{row.zeros:.4f}"
        if row.speed is not None:
            cells |= _times(row.speed)
        for phase, seconds in row.predicted_seconds.items():
            cells[f"{phase} by the table, ms"] = f"{seconds * 1e3:.2f}"
        if row.memory_bytes is not None:
            cells["weights in memory, MB"] = f"{row.memory_bytes / 1e6:.2f}"
        if row.file_bytes is not None:
            cells["weights on disk, MB"] = f"{row.file_bytes / 1e6:.2f}"
        return cells


def _times(speed: Speed) -> dict[str, str]:
    """Title to a median with its range, ms."""
    cells = {}
    for title, key, digits in (
        ("prefill, ms", "prefill_seconds", 1),
        ("time to first token, ms", "first_token_seconds", 1),
        ("decode, ms per token", "decode_seconds", 2),
    ):
        cells[title] = f"{getattr(speed, key) * 1e3:.{digits}f}"
        if found := speed.ranges.get(key):
            low, high = (f"{value * 1e3:.{digits}f}" for value in found)
            cells[title] += f" ({low} to {high})"
    if speed.peak_memory_bytes is not None:
        cells["peak memory, MB"] = f"{speed.peak_memory_bytes / 1e6:.0f}"
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
    tokenizer: Any = None,
    prompts: Sequence[Prompt] = (),
    latency: LatencyTable | None = None,
) -> Report:
    """Measure models side by side; the dense one comes first.

    Args:
        models: Name to causal language model.
        texts: Name to windows of token ids, see `cut_windows`; one or more.
        folders: Name to the folder of a model, for its file size.
        batch_size: Windows per forward pass, 1 or more.
        speed: Settings of `measure_speed` besides its models; None skips this measurement.
        tasks: Name to multiple-choice questions, see `read_questions`; None skips them.
        tokenizer: Decodes the answers to `prompts`.
        prompts: Prompts that all models answer, see `prompts_for`; empty skips them.
        latency: Table of times; speed is measured at its prompt, tokens and batch, and what it
            predicts is told beside.

    Raises:
        ValueError: There is no model or no text, a folder belongs to no model, or the table is that
            of another model.
    """
    folders = folders or {}
    if not models or not texts:
        raise ValueError(f"A report needs models and texts, got {len(models)} and {len(texts)}.")
    if strange := sorted(set(folders) - set(models)):
        raise ValueError(f"`folders` names {', '.join(strange)}, which `models` does not.")
    if latency is not None:
        for model in models.values():
            latency.check_model(model.config, "The table of times")
        names = ("batch_size", "prompt_tokens", "new_tokens")
        speed = {**(speed or {}), **{name: getattr(latency, name) for name in names}}
    speeds = measure_speed(models, **speed) if speed is not None else {}
    rows = []
    for number, (name, model) in enumerate(models.items(), start=1):
        with part(f"{name}, {number} of {len(models)}"):
            rows.append(
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
                        task: zero_shot(model, questions)
                        for task, questions in (tasks or {}).items()
                    },
                    memory_bytes=memory_bytes(model),
                    zeros=zero_fraction(model),
                    generation=generate(model, tokenizer, prompts) if prompts else None,
                    predicted_seconds=(
                        {} if latency is None else {p: latency.seconds(model, p) for p in PHASES}
                    ),
                )
            )
    first = next(iter(models.values()))
    device = next(first.parameters()).device.type
    conditions: dict[str, Any] = {
        "device": device,
        "dtype": str(first.dtype).removeprefix("torch."),
    }
    if device == "cpu":
        conditions["threads"] = torch.get_num_threads()
        if speeds:  # times of a busy machine are doubtful, and nobody else can tell
            conditions["load"] = f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores"
    if latency is not None:
        conditions["table of times from"] = latency.measured_on
    context = max(windows_NT.shape[1] for windows_NT in texts.values())
    return Report(rows, context, conditions | dict(speed or {}))
