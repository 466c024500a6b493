"""What models answer: the same prompts continued greedily, and how much the answers repeat.

Perplexity and multiple choice survive pruning that generation does not: a model may predict every
next token of a text well and still go round in circles once it reads what it wrote.

    repetition   fraction of the runs of 4 tokens of an answer that occurred in it before
    loops        the answer ends in one piece that is repeated 3 times or more, over half of it

Legend: N = windows, T = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from secateur.pruning.modes import evaluation
from secateur.pruning.progress import tracked

NEW_TOKENS = 64
"""Most tokens of an answer."""
_PROMPTS = 4
_OPENING = 32  # tokens of a text that a model without a chat template goes on from
_RUN = 4
_FEWEST = 12  # tokens of an answer that can be told to loop

QUESTIONS = (
    "Explain in two sentences why the sky is blue.",
    "Write three sentences about a dog that finds an old key.",
    "What is the difference between a lake and a river?",
    "List four things that one needs to bake bread, and say what each is for.",
)
"""What models with a chat template are asked."""


@dataclass(frozen=True)
class Prompt:
    """What a model continues.

    Args:
        text: For people: a question, or the opening of a text.
        ids: Token ids, 1 or more, chat template included.
        is_chat: Whether they are a turn of a conversation.
    """

    text: str
    ids: tuple[int, ...]
    is_chat: bool = False


@dataclass(frozen=True)
class Answer:
    """How a model continues a prompt.

    Args:
        prompt: The prompt, for people.
        text: The answer.
        repetition: Fraction of its runs of 4 tokens that occurred before, in [0, 1].
        loops: Whether it ends in a piece that is repeated again and again.
    """

    prompt: str
    text: str
    repetition: float
    loops: bool


@dataclass(frozen=True)
class Generation:
    """The answers of one model.

    Args:
        answers: One per prompt.
        repetition: Mean of theirs.
        broken: Whether more than half of them loop.
        chat: Whether it was asked through its chat template.
    """

    answers: tuple[Answer, ...]
    repetition: float
    broken: bool
    chat: bool


def prompts_for(tokenizer: Any, windows_NT: Int[Tensor, "N T"]) -> list[Prompt]:
    """Questions, as the chat template puts them; without one, the openings of texts.

    Args:
        tokenizer: A transformers tokenizer.
        windows_NT: Token ids of text, 2 or more per window.
    """
    if getattr(tokenizer, "chat_template", None):
        return [Prompt(question, _as_chat(tokenizer, question), True) for question in QUESTIONS]
    count, tokens = windows_NT.shape
    places = torch.linspace(0, count - 1, min(_PROMPTS, count)).round().long().tolist()
    openings = [windows_NT[place, : min(_OPENING, tokens // 2)].tolist() for place in places]
    return [Prompt(tokenizer.decode(ids, skip_special_tokens=True), tuple(ids)) for ids in openings]


def _as_chat(tokenizer: Any, question: str) -> tuple[int, ...]:
    turn = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], new_tokens: int = NEW_TOKENS
) -> Generation:
    """Let a model continue prompts, greedily and one at a time; it is in evaluation mode meanwhile.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        prompts: From `prompts_for`; one that leaves no room for an answer loses tokens in front.
        new_tokens: Most tokens of an answer, 1 or more; at most half of the positions are used.

    Raises:
        ValueError: There are no prompts, or `new_tokens` is below 1.
    """
    if not prompts or new_tokens < 1:
        raise ValueError(
            f"Prompts and `new_tokens` must be 1 or more, got {len(prompts)} and {new_tokens}."
        )
    half = max(1, model.config.max_position_embeddings // 2)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(new_tokens, half),
        eos_token_id=model.generation_config.eos_token_id,
        bos_token_id=model.generation_config.bos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,  # of batches, which there are none
    )
    answers = []
    with evaluation(model), torch.inference_mode():
        for prompt in tracked(prompts, "Generating answers"):
            ids = prompt.ids[-half:]
            input_1T = torch.tensor([ids], device=model.device)
            output_1T = model.generate(
                input_1T, attention_mask=torch.ones_like(input_1T), generation_config=greedy
            )
            new = output_1T[0, len(ids) :].tolist()
            text = tokenizer.decode(new, skip_special_tokens=True)
            answers.append(Answer(prompt.text, text, repetition(new), loops(new)))
    mean = sum(answer.repetition for answer in answers) / len(answers)
    looping = sum(answer.loops for answer in answers)
    chat = any(prompt.is_chat for prompt in prompts)
    return Generation(tuple(answers), mean, looping > len(answers) / 2, chat)


def repetition(ids: Sequence[int]) -> float:
    """Fraction of the runs of 4 tokens that occurred before; 0 where there is none.

    Example: 1 2 3 4 1 2 3 4 has five runs, and the last one is the first again: 0.2.
    """
    runs = [tuple(ids[start : start + _RUN]) for start in range(len(ids) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def loops(ids: Sequence[int]) -> bool:
    """Whether tokens end in one piece repeated 3 times or more, over half of them or more.

    Fewer than 12 tokens are too few to tell.
    """
    if len(ids) < _FEWEST:
        return False
    for period in range(1, len(ids) // 3 + 1):
        same = 0
        while same + period < len(ids) and ids[-1 - same] == ids[-1 - same - period]:
            same += 1
        if same + period >= max(3 * period, len(ids) / 2):
            return True
    return False
