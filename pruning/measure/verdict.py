"""What measured figures come to, in two sentences: quality, then what is saved.

The words follow from fixed limits of the mean excess, ln(perplexity / dense perplexity) in nats per
token, which are conventions of this file and no result of the literature. A model whose perplexity
is twice the dense one, or that loops where the dense one does not, has collapsed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from secateur.pruning.measure.row import Row
from secateur.pruning.measure.zero_shot import ZeroShot

_WORDS = (
    (-0.02, "better than"),
    (0.02, "as well as"),
    (0.1, "slightly worse than"),
    (0.3, "clearly worse than"),
    (math.log(2), "much worse than"),
)
A_ZERO = 0.005
"""Fraction of zeros that is worth a word."""
_SAME = 0.995  # fraction from which on nothing is saved


class Grade(StrEnum):
    """How much of the quality is left."""

    GOOD = "good"
    WORSE = "worse"
    COLLAPSED = "collapsed"


@dataclass(frozen=True)
class Verdict:
    """What a comparison comes to.

    Args:
        grade: How much of the quality is left.
        quality: A sentence on quality.
        saving: A sentence on size, operations, speed and zeros.
    """

    grade: Grade
    quality: str
    saving: str

    @property
    def text(self) -> str:
        """Both sentences."""
        return f"{self.quality} {self.saving}"


def judge(dense: Row, made: Row, context_tokens: int) -> Verdict:
    """Compare a model with the dense one.

    Args:
        dense: The dense model.
        made: The other one, measured on the same texts.
        context_tokens: Context that whole-model FLOPs are counted at, 0 or more.
    """
    loops = _loops_anew(dense, made)
    grade = _grade(excess(dense, made), loops)
    return Verdict(grade, _quality(dense, made, grade, loops), _saving(dense, made, context_tokens))


def excess(dense: Row, made: Row) -> float:
    """Mean over the texts of ln(perplexity / dense perplexity), nats per token."""
    found = [made.perplexity[t].mean_nll - d.mean_nll for t, d in dense.perplexity.items()]
    return sum(found) / len(found)


def _loops_anew(dense: Row, made: Row) -> bool:
    if dense.generation is None or made.generation is None:
        return False
    return made.generation.broken and not dense.generation.broken


def _loops_more(dense: Row, made: Row) -> str:
    """How many of the answers go round in circles, in words; empty if no more than dense ones."""
    if dense.generation is None or made.generation is None:
        return ""
    theirs, ours = (
        sum(answer.loops for answer in own.answers) for own in (dense.generation, made.generation)
    )
    if ours <= theirs:
        return ""
    return f"{ours} of {len(made.generation.answers)} answers loop ({theirs} of {dense.name})"


def _grade(nats: float, loops: bool) -> Grade:
    if loops or not nats < math.log(2):  # so that a NaN has collapsed
        return Grade.COLLAPSED
    return Grade.GOOD if nats < _WORDS[2][0] else Grade.WORSE


def _quality(dense: Row, made: Row, grade: Grade, loops: bool) -> str:
    nats = excess(dense, made)
    parts = [
        f"perplexity {made.perplexity[text].value:.2f} against {found.value:.2f} on {text}"
        for text, found in dense.perplexity.items()
    ]
    parts += [
        f"accuracy {_percent(made.zero_shot[task])} against {_percent(found)} on {task}"
        for task, found in dense.zero_shot.items()
    ]
    if turns := _loops_more(dense, made):
        parts.append(turns)
    if loops:
        parts.append("and it repeats itself when it generates: it is broken")
    figures = ", ".join(parts)
    if grade is Grade.COLLAPSED:
        return f"The quality of {made.name} has collapsed: {figures}."
    word = next(word for limit, word in _WORDS if nats < limit)
    signed = f"{nats:+.3f} nats per token" + (" in the mean" if len(dense.perplexity) > 1 else "")
    return f"The model {made.name} predicts text {word} {dense.name} ({signed}): {figures}."


def _percent(found: ZeroShot) -> str:
    error = "" if found.accuracy_error is None else f" +- {found.accuracy_error:.1%}"
    return f"{found.accuracy:.1%}{error}"


def _saving(dense: Row, made: Row, context_tokens: int) -> str:
    parameters = made.counts.parameters / dense.counts.parameters
    flops, of_dense = (row.counts.flops_per_token(context_tokens) for row in (made, dense))
    if min(parameters, flops / of_dense) >= _SAME:
        parts = ["has the parameters and the FLOPs of " + dense.name]
    else:
        at = f"at {context_tokens} tokens of context"
        parts = [
            f"has {parameters:.1%} of the parameters and {flops / of_dense:.1%} of the FLOPs per "
            f"token ({at})"
        ]
    if made.file_bytes and dense.file_bytes:
        parts.append(f"takes {made.file_bytes / dense.file_bytes:.1%} of the bytes on disk")
    parts += _pace(dense, made)
    if made.zeros is not None and made.zeros > A_ZERO:
        parts.append(
            f"has {made.zeros:.1%} zeros among the weights of its blocks, which save nothing "
            "without kernels for zeros"
        )
    return f"It {_joined(parts)}."


def _pace(dense: Row, made: Row) -> list[str]:
    """What speed comes to; a difference inside the spread of the repeats is none."""
    if dense.speed is None or made.speed is None:
        return []
    found = []
    for name, key in (("prefill", "prefill_seconds"), ("a decoded token", "decode_seconds")):
        theirs, ours = (row.speed.ranges.get(key) for row in (dense, made) if row.speed)
        if theirs and ours and ours[0] <= theirs[1] and theirs[0] <= ours[1]:
            found.append(f"the time of {dense.name} for {name} (within the spread)")
        else:
            share = getattr(made.speed, key) / getattr(dense.speed, key)
            found.append(f"{share:.2f} of the time for {name}")
    return [f"needs {' and '.join(found)}"]


def _joined(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)}, and {last}" if first else last
