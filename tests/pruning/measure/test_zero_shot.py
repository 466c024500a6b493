from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.pruning.measure.zero_shot import (
    Ending,
    Question,
    encode_question,
    log_likelihoods,
    read_questions,
    zero_shot,
)
from tests.tiny import SENTENCES, tiny_llama, tiny_tokenizer


class Bigram(nn.Module):
    """Logits that depend on the last token alone, given as a table of probabilities."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities).log())
        self.config = SimpleNamespace(max_position_embeddings=8)

    def forward(self, input_ids: Tensor, logits_to_keep: int, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:])


def ending(*ids: int, start: int = 1, characters: int = 1) -> Ending:
    return Ending(ids, start, characters)


def questions(count: int = 7) -> list[Question]:
    """Halves of sentences, each with its own end and those of others."""
    halves = [sentence.split(",")[0].rsplit(" ", 3) for sentence in SENTENCES]
    made = []
    for number in range(count):
        context, *words = halves[number % len(halves)]
        endings = [" ".join(words), words[0], "nothing but rain, rain and rain"]
        made.append(encode_question(tiny_tokenizer(), context, endings, number % 3))
    return made


def test_a_case_worked_by_hand() -> None:
    """P(0|0) = 1/2, P(1|0) = 1/2, P(0|1) = 1/4, P(1|1) = 3/4; the context is the token 0.

    Question 1: p(1) = 1/2 of 1 character, p(1, 1) = 3/8 of 4 characters. Plain takes the first,
    ln(3/8) / 4 = -0.245 beats ln(1/2) / 1 = -0.693: by length it is the second. Question 2: the
    same with the other label. One of two is right: the error is sqrt(1/2 1/2 / (2 - 1)) = 1/2.
    """
    model = Bigram([[0.5, 0.5], [0.25, 0.75]])
    short, long = ending(0, 1), ending(0, 1, 1, characters=4)
    scores_E = log_likelihoods(model, [short, long], 2)
    assert scores_E.tolist() == pytest.approx([math.log(1 / 2), math.log(3 / 8)], rel=1e-6)
    result = zero_shot(model, [Question((short, long), 0), Question((short, long), 0)])
    assert (result.accuracy, result.normalised) == (1.0, 0.0)
    result = zero_shot(model, [Question((short, long), 0), Question((short, long), 1)])
    assert (result.accuracy, result.normalised) == (0.5, 0.5)
    assert result.accuracy_error == result.normalised_error == 0.5
    assert zero_shot(model, [Question((short, long), 0)]).accuracy_error is None


def test_batches_do_not_matter_and_each_ending_is_scored_as_if_alone() -> None:
    model = tiny_llama()
    endings = [ending for question in questions() for ending in question.endings]
    expected = []
    for own in endings:
        ids_1T = torch.tensor([own.ids])
        with torch.no_grad():
            logp_TV = model(ids_1T).logits[0].double().log_softmax(-1)
        places = range(own.start, len(own.ids))
        expected.append(sum(float(logp_TV[t - 1, own.ids[t]]) for t in places))
    for batch_size in (1, 4, 100):
        found_E = log_likelihoods(model, endings, batch_size)
        assert found_E.tolist() == pytest.approx(expected, abs=1e-4)
    assert len({len(ending.ids) for ending in endings}) > 2  # there was padding


def test_the_tokens_are_those_of_one_text() -> None:
    tokenizer = tiny_tokenizer()
    plain = encode_question(tokenizer, "A tree", ["that is", "bears"], 1)
    assert plain.label == 1
    for ending, text in zip(plain.endings, ("that is", "bears"), strict=True):
        assert list(ending.ids) == tokenizer(f"A tree {text}")["input_ids"]
        assert ending.ids[0] == tokenizer.bos_token_id  # the tokenizer adds it by itself
        assert tokenizer.decode(list(ending.ids[ending.start :])) == f" {text}"
        assert ending.characters == len(text)
    spaced = encode_question(tokenizer, "A tree ", ["that is", "bears"], 1)
    for ending, text in zip(spaced.endings, ("that is", "bears"), strict=True):
        assert tokenizer.decode(list(ending.ids[ending.start :])) == f"  {text}"
        assert ending.characters == len(text)


def test_long_contexts_are_cut_in_front_and_counted() -> None:
    model = tiny_llama()
    long, short = ending(1, 5, 6, 7, 8, start=3), ending(1, 5, 9, start=2)
    question = Question((long, short), 0)
    assert zero_shot(model, [question], max_tokens=4).num_truncated == 0
    assert zero_shot(model, [question], max_tokens=3).num_truncated == 1
    cut = Question((ending(6, 7, 8, start=1), short), 0)
    scores = [log_likelihoods(model, q.endings, 1) for q in (question, cut)]
    assert float((scores[0] - scores[1]).abs().max()) > 1e-3  # the context matters
    with pytest.raises(ValueError, match="has 2 tokens and `max_tokens` is 1"):
        zero_shot(model, [question], max_tokens=1)


def test_the_model_keeps_its_mode() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    result = zero_shot(model, questions())
    assert model.training
    assert result == zero_shot(model, questions())  # without dropout


def test_questions_are_read_from_lines(tmp_path: Path) -> None:
    line = {"ctx": "A tree", "endings": ["bears", "that is"], "label": 1, "id": 3}
    path = tmp_path / "some.jsonl"
    path.write_text(f"{json.dumps(line)}\n\n{json.dumps(line | {'label': 0})}\n")
    assert [question.label for question in read_questions(path, tiny_tokenizer())] == [1, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, is not a question: JSONDecodeError"),
        ("[]", "line 2, is not a question: TypeError"),
        ('{"ctx": "a", "endings": ["b", "c"]}', "line 2, is not a question: KeyError.'label'"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "got 2 endings and label 2"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": "1"}', "line 2, is not a question: Type"),
        ('{"ctx": "a", "endings": "bc", "label": 1}', "`endings` must be a list of texts"),
        ('{"ctx": "a", "endings": ["b"], "label": 0}', "got 1 endings and label 0"),
        ('{"ctx": "a", "endings": ["b", ""], "label": 0}', "The ending '' adds no token"),
        ('{"ctx": " ", "endings": ["b", "c"], "label": 0}', "The context of a question is empty"),
    ],
)
def test_a_line_that_is_no_question_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"ctx": "a", "endings": ["b", "c"], "label": 0}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_questions(path, tiny_tokenizer())


def test_bad_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"none.jsonl holds no question"):
        read_questions(tmp_path / "none.jsonl", tiny_tokenizer())
    model = tiny_llama()
    with pytest.raises(ValueError, match="`questions` must be 1 or more, got 0"):
        zero_shot(model, [])
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, got 0"):
        zero_shot(model, questions(), batch_size=0)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer("A tree")["input_ids"][-1])
    with pytest.raises(ValueError, match="adds EOS after every text.*`add_eos_token=False`"):
        encode_question(tokenizer, "A tree", ["bears", "that is"], 0)
