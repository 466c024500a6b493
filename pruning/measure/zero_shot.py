"""Zero-shot multiple choice: the answer is the ending with the highest likelihood.

The log-likelihood of an ending is the sum over its tokens, given the context and the tokens before:

    plain       argmax_e  log p(e | context)
    normalised  argmax_e  log p(e | context) / characters of e

These are `acc` and `acc_norm` of the Language Model Evaluation Harness (lm-eval, its task type
`multiple_choice`), with the same tokenisation; harnesses with another tokenisation differ by
points:

- context, one space and ending are encoded as one text, with the special tokens that the tokenizer
  adds by default; the tokens after those of the context alone are the ending. Spaces at the end of
  a context belong to the ending.
- a text that is too long is cut at the front, BOS first;
- the characters of an ending are those of its text, without the space before it.

Legend: E = endings, B = endings of a batch, T = tokens, t = the last of them, whose logits are
needed, P = predictions of all endings of a batch, V = vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from secateur.pruning.modes import evaluation
from secateur.pruning.progress import tracked


@dataclass(frozen=True)
class Ending:
    """One answer to a question, with its context before it.

    Args:
        ids: Token ids of context and ending.
        start: Index of the first token of the ending, 1 or more.
        characters: Length of the text of the ending, 1 or more.
    """

    ids: tuple[int, ...]
    start: int
    characters: int


@dataclass(frozen=True)
class Question:
    """A multiple-choice question, as tokens.

    Args:
        endings: The answers to choose from, 2 or more.
        label: Place of the right one, from 0.
    """

    endings: tuple[Ending, ...]
    label: int


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy of a model on questions; chance is one over the number of endings.

    Args:
        accuracy: Fraction answered correctly by likelihood, in [0, 1].
        accuracy_error: Its standard error; None for a single question.
        normalised: Fraction answered correctly by likelihood per character, in [0, 1].
        normalised_error: Its standard error; None for a single question.
        num_questions: Number of questions.
        num_truncated: Endings whose context was cut at the front to fit the model.
    """

    accuracy: float
    accuracy_error: float | None
    normalised: float
    normalised_error: float | None
    num_questions: int
    num_truncated: int


def encode_question(tokenizer: Any, context: str, endings: Sequence[str], label: int) -> Question:
    """Tokenise a question.

    Args:
        tokenizer: A transformers tokenizer.
        context: Text before every ending.
        endings: The answers to choose from, 2 or more.
        label: Index of the correct one, from 0.

    Raises:
        ValueError: The context or an ending is empty or adds no token, there are fewer than two
            endings, the label is out of range, or the tokenizer adds EOS after every text.
    """
    if len(endings) < 2 or not 0 <= label < len(endings):
        raise ValueError(
            f"A question needs 2 or more endings and a label among them, got {len(endings)} "
            f"endings and label {label}."
        )
    stem = context.rstrip()
    if not stem:
        raise ValueError("The context of a question is empty; give a context.")
    texts = [f"{context} {ending}" for ending in endings]
    stem_ids, *whole_ids = tokenizer([stem, *texts], verbose=False)["input_ids"]
    if stem_ids[-1] == tokenizer.eos_token_id:
        raise ValueError(
            "The tokenizer adds EOS after every text, so that no ending can follow a context; "
            "load it with `add_eos_token=False`."
        )
    for ending, ids in zip(endings, whole_ids, strict=True):
        if not ending or len(ids) <= len(stem_ids):
            raise ValueError(f"The ending {ending!r} adds no token to its context {context!r}.")
    found = [
        Ending(tuple(ids), len(stem_ids), len(ending))
        for ending, ids in zip(endings, whole_ids, strict=True)
    ]
    return Question(tuple(found), label)


def read_questions(path: str | Path, tokenizer: Any) -> list[Question]:
    """Read questions from JSON lines, each an object with `ctx`, `endings` and `label`.

    Args:
        path: The file; empty lines are skipped, other fields are ignored.
        tokenizer: A transformers tokenizer.

    Raises:
        ValueError: There is no question, or a line is not a question; the line is named.
        OSError: The file cannot be read.
    """
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            context, endings, label = item["ctx"], item["endings"], item["label"]
            if not isinstance(endings, list):
                raise TypeError(f"`endings` must be a list of texts, got {endings!r}.")
            questions.append(encode_question(tokenizer, context, endings, label))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}, is not a question: {error!r}. A line is an object with "
                "the "
                "context `ctx`, the texts `endings` and the index `label` of the correct one, from "
                "0."
            ) from error
    if not questions:
        raise ValueError(f"{path} holds no question.")
    return questions


def zero_shot(
    model: Any,
    questions: Sequence[Question],
    batch_size: int = 16,
    max_tokens: int | None = None,
) -> ZeroShot:
    """Measure the accuracy of a model, temporarily in evaluation mode.

    Args:
        model: A transformers causal language model.
        questions: From `read_questions`, 1 or more.
        batch_size: Endings per forward pass, 1 or more; does not change the result.
        max_tokens: Longest input of the model in tokens, 1 or more; None takes
            `max_position_embeddings` of its configuration.

    Raises:
        ValueError: There are no questions, a setting is below 1, or an ending alone is longer than
            `max_tokens`.
    """
    limit = model.config.max_position_embeddings if max_tokens is None else max_tokens
    for name, value in (
        ("questions", len(questions)),
        ("batch_size", batch_size),
        ("max_tokens", limit),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {value}.")
    endings = [ending for question in questions for ending in question.endings]
    fitting = [truncate(ending, limit) for ending in endings]
    scores = iter(log_likelihoods(model, fitting, batch_size).tolist())
    plain, normalised = [], []
    for question in questions:
        own = [next(scores) for _ in question.endings]
        per_character = [
            score / ending.characters for score, ending in zip(own, question.endings, strict=True)
        ]
        plain.append(own.index(max(own)) == question.label)
        normalised.append(per_character.index(max(per_character)) == question.label)
    return ZeroShot(
        *_mean_and_error(plain),
        *_mean_and_error(normalised),
        num_questions=len(questions),
        num_truncated=sum(a is not b for a, b in zip(endings, fitting, strict=True)),
    )


def truncate(ending: Ending, max_tokens: int) -> Ending:
    """The same ending with its context cut to fit a model.

    Args:
        ending: An ending with its context.
        max_tokens: Longest input of the model in tokens, 1 or more; the last token is only
            predicted and not part of the input.

    Raises:
        ValueError: The ending alone is longer.
    """
    if (surplus := len(ending.ids) - 1 - max_tokens) <= 0:
        return ending
    if surplus >= ending.start:
        raise ValueError(
            f"An ending has {len(ending.ids) - ending.start} tokens and `max_tokens` is "
            f"{max_tokens}; use shorter questions for this model."
        )
    return Ending(ending.ids[surplus:], ending.start - surplus, ending.characters)


@torch.inference_mode()
def log_likelihoods(model: Any, endings: Sequence[Ending], batch_size: int) -> Float[Tensor, " E"]:
    """Log-likelihood of every ending given its context, nats, float64 on the CPU.

    Args:
        model: A transformers causal language model; temporarily in evaluation mode.
        endings: Endings in any order; batches are made of endings of similar lengths.
        batch_size: Endings per forward pass, 1 or more.
    """
    order = sorted(range(len(endings)), key=lambda place: -len(endings[place].ids))
    scores_E = torch.empty(len(endings), dtype=torch.float64)
    with evaluation(model):
        for first in tracked(range(0, len(order), batch_size), "Answering questions"):
            places = order[first : first + batch_size]
            scores_E[places] = _batch_scores(model, [endings[place] for place in places])
    return scores_E


def _batch_scores(model: Any, endings: Sequence[Ending]) -> Float[Tensor, " B"]:
    device = next(model.parameters()).device
    # Padding is after the tokens, where a causal model does not attend.
    tokens_BT = pad_sequence([torch.tensor(e.ids) for e in endings], batch_first=True).to(device)
    starts_B1 = torch.tensor([[ending.start] for ending in endings], device=device)
    lengths_B1 = torch.tensor([[len(ending.ids)] for ending in endings], device=device)
    first = min(ending.start for ending in endings)
    targets_Bt = tokens_BT[:, first:]
    place_t = torch.arange(first, tokens_BT.shape[1], device=device)
    ours_Bt = (place_t >= starts_B1) & (place_t < lengths_B1)
    logits_BtV = model(
        input_ids=tokens_BT[:, :-1], use_cache=False, logits_to_keep=targets_Bt.shape[1]
    ).logits
    nll_P = F.cross_entropy(logits_BtV[ours_Bt].float(), targets_Bt[ours_Bt], reduction="none")
    rows_P = ours_Bt.nonzero()[:, 0].cpu()
    scores_B = torch.zeros(len(endings), dtype=torch.float64)
    return scores_B.index_add(0, rows_P, -nll_P.double().cpu())


def _mean_and_error(right: Sequence[bool]) -> tuple[float, float | None]:
    count, mean = len(right), sum(right) / len(right)
    return mean, math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None
