from __future__ import annotations

import math
from typing import Any

import pytest

from secateur.pruning.measure.generation import Answer, Generation
from secateur.pruning.measure.perplexity import MeasuredPerplexity
from secateur.pruning.measure.row import Row
from secateur.pruning.measure.sizes import Counts
from secateur.pruning.measure.speed import Speed
from secateur.pruning.measure.verdict import Grade, judge
from secateur.pruning.measure.zero_shot import ZeroShot


def row(name: str, perplexity: float, flops: int = 1600, **more: Any) -> Row:
    text = {"stories": MeasuredPerplexity(perplexity, math.log(perplexity), None, 10)}
    return Row(name, text, Counts(flops // 2 + 200, 800, flops, 100, 5), **more)


def speed(low: float, high: float) -> Speed:
    ranges = {"prefill_seconds": (low, high), "decode_seconds": (low / 10, high / 10)}
    middle = (low + high) / 2
    return Speed(middle, middle, middle / 10, 1.0, None, ranges)


@pytest.mark.parametrize(
    ("perplexity", "grade", "words"),
    [
        (9.0, Grade.GOOD, "better than"),
        (10.1, Grade.GOOD, "as well as"),
        (10.9, Grade.GOOD, "slightly worse than"),
        (12.0, Grade.WORSE, "clearly worse than"),
        (19.0, Grade.WORSE, "much worse than"),
        (20.1, Grade.COLLAPSED, "has collapsed"),
        (math.nan, Grade.COLLAPSED, "has collapsed"),
    ],
)
def test_words_follow_from_the_excess(perplexity: float, grade: Grade, words: str) -> None:
    found = judge(row("dense", 10.0), row("pruned", perplexity), 10)
    assert found.grade is grade
    assert words in found.quality


def test_two_sentences_say_what_is_lost_and_what_is_saved() -> None:
    answers = ZeroShot(0.5, 0.02, 0.5, 0.02, 600, 0)
    dense = row("dense", 10.0, speed=speed(0.20, 0.22), file_bytes=200, zero_shot={"qa": answers})
    worse = ZeroShot(0.4, 0.02, 0.4, 0.02, 600, 0)
    made = row(
        "pruned", 12.0, 800, speed=speed(0.10, 0.11), file_bytes=100, zero_shot={"qa": worse}
    )
    assert judge(dense, made, 10).text == (
        "The model pruned predicts text clearly worse than dense (+0.182 nats per token): "
        "perplexity 12.00 against 10.00 on stories, accuracy 40.0% +- 2.0% against 50.0% +- 2.0% "
        "on qa. It has 60.0% of the parameters and 57.9% of the FLOPs per token (at 10 tokens of "
        "context), takes 50.0% of the bytes on disk, and needs 0.50 of the time for prefill and "
        "0.50 of the time for a decoded token."
    )


def test_a_difference_inside_the_spread_is_none() -> None:
    dense, made = row("dense", 10.0, speed=speed(1.0, 2.0)), row("p", 10.0, speed=speed(0.8, 1.1))
    saving = judge(dense, made, 10).saving
    assert "the time of dense for prefill (within the spread)" in saving


def test_zeros_alone_save_nothing() -> None:
    assert judge(row("dense", 10.0), row("p", 10.1, zeros=0.5), 10).saving == (
        "It has the parameters and the FLOPs of dense, and has 50.0% zeros among the weights of "
        "its blocks, which save nothing without kernels for zeros."
    )


@pytest.mark.parametrize(("dense_loops", "grade"), [(False, Grade.COLLAPSED), (True, Grade.GOOD)])
def test_a_model_that_loops_where_the_dense_one_does_not_has_collapsed(
    dense_loops: bool, grade: Grade
) -> None:
    dense = row("dense", 10.0, generation=Generation((), 0.0, dense_loops, False))
    made = row("pruned", 10.0, generation=Generation((), 0.9, True, False))
    found = judge(dense, made, 10)
    assert found.grade is grade
    assert ("it is broken" in found.quality) is not dense_loops


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [(0, 2, "2 of 4 answers loop (0 of dense)"), (1, 2, "2 of 4 answers loop"), (2, 2, None)],
)
def test_answers_that_loop_are_counted_where_dense_ones_do_not(
    theirs: int, ours: int, words: str | None
) -> None:
    def answered(looping: int) -> Generation:
        answers = tuple(Answer("q", "a", 0.0, number < looping) for number in range(4))
        return Generation(answers, 0.0, False, True)

    found = judge(
        row("dense", 10.0, generation=answered(theirs)),
        row("pruned", 12.0, generation=answered(ours)),
        10,
    )
    assert found.grade is Grade.WORSE
    assert ("answers loop" in found.quality) is (words is not None)
    assert words is None or words in found.quality
