from __future__ import annotations

import pytest
import torch

from secateur.pruning.measure.generation import (
    QUESTIONS,
    Prompt,
    generate,
    loops,
    prompts_for,
    repetition,
)
from tests.tiny import VOCABULARY, tiny_llama, tiny_tokenizer


def test_runs_of_four_that_come_back_are_counted() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 7) == pytest.approx(3 / 4)  # four runs, one of them new
    assert repetition([1, 2, 3]) == 0


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([*range(20), *[1, 2, 3] * 7], True),  # the second half is one piece, seven times
        ([*range(22), *[1, 2, 3] * 6], False),  # less than half
        ([5] * 12, True),
        ([5] * 11, False),  # too few to tell
        ([*range(10), *range(10)], False),  # twice only
        (list(range(40)), False),
    ],
)
def test_an_answer_loops_if_half_of_it_is_one_piece_again_and_again(
    ids: list[int], expected: bool
) -> None:
    assert loops(ids) is expected


def test_without_a_chat_template_texts_go_on_from_their_openings() -> None:
    windows_NT = torch.randint(3, VOCABULARY, (9, 20), generator=torch.Generator().manual_seed(0))
    prompts = prompts_for(tiny_tokenizer(), windows_NT)
    assert [prompt.ids for prompt in prompts] == [
        tuple(windows_NT[place, :10].tolist()) for place in (0, 3, 5, 8)
    ]
    assert not any(prompt.is_chat for prompt in prompts)


def test_with_one_questions_are_asked_through_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompts = prompts_for(tokenizer, torch.zeros(1, 4, dtype=torch.long))
    assert [prompt.text for prompt in prompts] == [*QUESTIONS]
    assert tokenizer.decode(prompts[0].ids) == f"[user]{QUESTIONS[0]}[assistant]"


def test_answers_are_those_of_a_greedy_loop() -> None:
    model, ids = tiny_llama().train(), (1, 40, 41, 42)
    found = generate(model, tiny_tokenizer(), [Prompt("a", ids)], new_tokens=6)
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert model.training
    assert found.answers[0].text == tiny_tokenizer().decode(tokens[4:], skip_special_tokens=True)


def test_a_model_that_says_one_word_is_broken_and_leaves_room_for_its_answer() -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens alike: the first one wins
    prompts = [Prompt("long", tuple(range(60))), Prompt("short", (1, 2))]
    found = generate(model, tiny_tokenizer(), prompts)
    assert [answer.loops for answer in found.answers] == [True, True]
    assert found.broken
    assert found.repetition == pytest.approx(28 / 29)  # 32 tokens, 29 runs, one of them new


def test_nothing_to_ask_is_told() -> None:
    with pytest.raises(ValueError, match="must be 1 or more, got 0 and 64"):
        generate(tiny_llama(), tiny_tokenizer(), [])
