"""Templates: the text of a row of instruction data, and where its responses lie in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jinja2
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character of a response, and the one after its last."""


class Template(ABC):
    """How a row of fields becomes a text.

    Attributes:
        adds_ends: Whether the tokenizer adds BOS in front, and EOS follows the text; false if the
            text has them.
    """

    adds_ends: ClassVar[bool]

    @abstractmethod
    def render(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, list[Span]]:
        """Text of a row, and its responses in order, one or more.

        Args:
            row: The fields.
            tokenizer: The tokenizer, whose chat template may be used.

        Raises:
            ValueError: The row lacks a field or a response, or cannot be rendered. The message has
                no subject: the caller names the row.
        """

    @abstractmethod
    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check, before rows are read, that a tokenizer suits.

        Raises:
            ValueError: It does not.
        """


@dataclass(frozen=True)
class Alpaca(Template):
    """The prompt of Stanford Alpaca, with an input or without.

    Args:
        instruction: Field of the instruction.
        input: Field of the input; rows may lack it, or have it empty.
        output: Field of the response.

    Source: Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), the prompts of its README.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    adds_ends: ClassVar[bool] = True

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Accept any tokenizer."""

    def render(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, list[Span]]:
        instruction, response = self._text(row, self.instruction), self._text(row, self.output)
        given = self._text(row, self.input) if row.get(self.input) is not None else ""
        if not response.strip():
            raise ValueError(f"has no response: {self.output!r} is empty; leave the row out")
        prompt = (_WITH_INPUT if given.strip() else _WITHOUT_INPUT).format(instruction, given)
        return prompt + response, [(len(prompt), len(prompt) + len(response))]

    @staticmethod
    def _text(row: Mapping[str, Any], name: str) -> str:
        if name not in row:
            raise ValueError(
                f"has no {name!r}, only {', '.join(map(repr, row))}; name the fields in `template`"
            )
        if not isinstance(row[name], str):
            raise ValueError(f"holds {type(row[name]).__name__} in {name!r}, not text")
        return str(row[name])


_BEGINNING = "Below is an instruction that describes a task"
_ASK = "Write a response that appropriately completes the request.\n\n### Instruction:\n{0}\n\n"
_WITH_INPUT = (
    f"{_BEGINNING}, paired with an input that provides further context. {_ASK}"
    "### Input:\n{1}\n\n### Response:\n"
)
_WITHOUT_INPUT = f"{_BEGINNING}. {_ASK}### Response:\n"


@dataclass(frozen=True)
class Chat(Template):
    """Conversations, rendered by the chat template of the tokenizer; every answer is a response.

    An answer begins where the template would let the model begin to write (its generation prompt),
    and ends with the marker of its end.

    Args:
        messages: Field with the list of messages, each with `role` and `content`.
    """

    messages: str = "messages"
    adds_ends: ClassVar[bool] = False

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "`template` Chat needs a chat template, and the tokenizer has none; use that of an "
                "instruction-tuned model, or `template` Alpaca."
            )

    def render(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, list[Span]]:
        messages = row.get(self.messages)
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise ValueError(f"has no list {self.messages!r}; name its field in `template`")
        if wrong := [m for m in messages if not isinstance(m, Mapping) or "role" not in m]:
            raise ValueError(f"holds {str(wrong[0])[:60]!r}, no message with `role` and `content`")
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not any(str(messages[place].get("content") or "").strip() for place in places):
            raise ValueError("has no response: no message of the assistant; leave the row out")
        text = _rendered(tokenizer, messages)
        return text, [_answer(tokenizer, messages, place, text) for place in places]


def _answer(tokenizer: Any, messages: Sequence[Any], place: int, text: str) -> Span:
    """Where the answer of one message lies in the text of all.

    Raises:
        ValueError: The template does not tell.
    """
    before = _rendered(tokenizer, messages[:place]) if place else ""
    begun = _rendered(tokenizer, messages[:place], add_generation_prompt=True)
    done = _rendered(tokenizer, messages[: place + 1]).rstrip()
    if len(begun) <= len(before):
        raise ValueError(
            "cannot be rendered: the chat template has no marker of the assistant, as "
            "`add_generation_prompt` adds nothing; use a template that has one"
        )
    if not text.startswith(begun) or not text.startswith(done) or len(done) <= len(begun):
        raise ValueError(
            f"cannot be rendered: the chat template changes earlier messages, so that answer "
            f"{place} is not found in the text; use another template, or `template` Alpaca"
        )
    return len(begun), len(done)


def _rendered(tokenizer: Any, messages: Sequence[Any], add_generation_prompt: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"cannot be rendered by the chat template: {error}") from error
    return str(text)
