"""What is damaged, incomplete, mixed up or made to mislead is refused, or does no harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.hostile_inputs import COUNTS, figures_of, measure
from tests.runs import NOISE

pytestmark = [*NOISE, pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")]


@pytest.mark.slow
def test_inputs_that_are_wrong_are_refused_or_do_no_harm(tmp_path: Path) -> None:
    """Thirty changes; the benchmark makes three hundred."""
    outcomes = measure(tmp_path, seed=5, count=30)
    faults = [
        (outcome.use, outcome.said, outcome.message) for outcome in outcomes if outcome.faults
    ]
    figures = figures_of(outcomes)
    assert not faults
    assert figures == {"mutations": 30, "refused": figures["refused"]} | dict.fromkeys(COUNTS, 0)
    assert figures["refused"] > 10
