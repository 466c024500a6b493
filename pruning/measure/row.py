"""What is known of one model of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.pruning.measure.generation import Generation
from secateur.pruning.measure.perplexity import MeasuredPerplexity
from secateur.pruning.measure.sizes import Counts
from secateur.pruning.measure.speed import Speed
from secateur.pruning.measure.zero_shot import ZeroShot


@dataclass(frozen=True)
class Row:
    """One model of a report.

    Args:
        name: What it is called, such as `dense`.
        perplexity: Text name to perplexity.
        counts: Its sizes.
        speed: Its speed, if it was measured.
        file_bytes: Bytes of its weights on disk, if it lies there.
        zero_shot: Task name to the answers right.
        memory_bytes: Bytes of its parameters and buffers in memory, if it was loaded whole.
        zeros: Fraction of the weights in its blocks that are exactly zero, if they were counted.
        generation: What it answers, if it was asked.
        predicted_seconds: Phase to the time of a pass by a latency table, if there is one.
    """

    name: str
    perplexity: Mapping[str, MeasuredPerplexity]
    counts: Counts
    speed: Speed | None = None
    file_bytes: int | None = None
    zero_shot: Mapping[str, ZeroShot] = field(default_factory=dict)
    memory_bytes: int | None = None
    zeros: float | None = None
    generation: Generation | None = None
    predicted_seconds: Mapping[str, float] = field(default_factory=dict)
