"""Instruction data: what counts, what is padded or packed, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.modules.data.instruction_data import InstructionData
from secateur.modules.data.responses import padded_batch
from secateur.modules.data.templates import Alpaca, Chat, Template
from tests.tiny import SENTENCES, tiny_tokenizer

EOS = 2
CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
NO_MARKER = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
REFUSES = "{{ raise_exception('System role not supported') }}"
FORGETS = CHATML.replace("m['content']", "m['content'][: loop.revindex * 2]")


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw, words = random.Random(seed), " ".join(SENTENCES).split()

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    return [
        {"instruction": text(1, 4), "input": text(0, 3), "output": text(1, 9)} for _ in range(count)
    ]


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": t} for n, t in enumerate(turns)]}


def data(
    folder: Path, found: Sequence[Any], chat_template: str | None = None, **settings: Any
) -> InstructionData:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder / "tokenizer")
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, found)), encoding="utf-8")
    defaults: dict[str, Any] = {
        "tokenizer": str(folder / "tokenizer"),
        "window_tokens": 400,
        "batch_size": 4,
        "held_out": 0.1,
        "cache_dir": str(folder / "cache"),
    }
    return InstructionData(str(path), **defaults | settings)


def counted(batch: dict[str, Tensor], row: int) -> list[int]:
    ids: list[int] = batch["input_ids"][row][batch["loss_mask"][row]].tolist()
    return ids


def test_a_prompt_of_three_and_a_response_of_two_padded_to_six() -> None:
    """The case worked by hand: predictions 2 and 3 of 5 count."""
    row = torch.arange(5), torch.tensor([False, False, False, True, True])
    batch = padded_batch([row], padding=9, most=6)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 9]]
    assert batch["loss_mask"][0, 1:].nonzero().flatten().tolist() == [2, 3]
    assert batch["lengths"].tolist() == [5]


def test_responses_and_the_end_count_prompts_do_not(tmp_path: Path) -> None:
    """BOS once in front, EOS after the response; equal to encoding the whole text."""
    given = rows(40)
    text = data(tmp_path, given)
    text.setup()
    tokenizer, kept = tiny_tokenizer(), [row for n, row in enumerate(given) if n % 10 != 9]
    assert len(text.train_parts[0]) == 36  # type: ignore[arg-type]
    for place in (0, 7, 35):
        whole, spans = Alpaca().render(kept[place], tokenizer)
        ids_I, flags_I = text.train_parts[0][place]
        assert ids_I.tolist() == [*tokenizer(whole)["input_ids"], EOS]
        assert tokenizer.decode(ids_I[flags_I]) == kept[place]["output"] + "</s>"
        assert whole[slice(*spans[0])] == kept[place]["output"]
        assert ("### Input:" in whole) == bool(kept[place]["input"])
    longest = max(int(length) for batch in text.val_dataloader() for length in batch["lengths"])
    widths = {batch["input_ids"].shape[1] for batch in text.val_dataloader()}
    assert max(widths) - longest < 8
    assert all(width % 8 == 0 for width in widths)


def test_every_answer_of_a_chat_counts(tmp_path: Path) -> None:
    talks = [chat("Cut?", "Not yet.", "Now?", "Above a bud."), chat("Why?", "Rain.")] * 6
    text = data(tmp_path, talks, CHATML, template=Chat(), held_out=0.5, window_tokens=96)
    text.setup()
    tokenizer = tiny_tokenizer()
    batch = next(iter(text.val_dataloader()))
    assert tokenizer.decode(counted(batch, 0)) == "Rain.</s>"
    ids_I, flags_I = text.train_parts[0][0]
    assert tokenizer.decode(ids_I[flags_I]) == "Not yet.</s>Above a bud.</s>"
    assert tokenizer.decode(ids_I).startswith("<user>Cut?</s>")  # no BOS of the tokenizer


def test_packed_rows_are_the_same_tokens_in_windows(tmp_path: Path) -> None:
    given = rows(40)
    packed = data(tmp_path, given, packing=True, window_tokens=32)
    padded = data(tmp_path, given)
    packed.setup()
    padded.setup()
    items = [padded.train_parts[0][n] for n in range(36)]
    tokens, flags = (torch.cat(parts) for parts in zip(*items, strict=True))
    windows = [packed.train_parts[0][n] for n in range(len(packed.train_parts[0]))]  # type: ignore[arg-type]
    count = len(windows) * 32
    assert 0 <= len(tokens) - count < 32
    assert torch.equal(torch.cat([ids for ids, _ in windows]), tokens[:count])
    assert torch.equal(torch.cat([flags for _, flags in windows]), flags[:count])
    batch = next(iter(packed.train_dataloader()))
    assert batch["input_ids"].shape == batch["loss_mask"].shape == (4, 32)
    assert torch.equal(torch.cat([*packed.train_windows]), tokens[:count])  # type: ignore[misc]


def test_an_epoch_has_every_row_once_and_resumes_at_any_batch(tmp_path: Path) -> None:
    text = data(tmp_path, rows(45), batch_size=4)
    text.setup()
    loader = text.train_dataloader()
    seen = list(loader)
    assert len(seen) == 41 // 4
    loader = text.train_dataloader()
    walk = iter(loader)
    for _ in range(3):
        next(walk)
    again = text.train_dataloader()
    again.load_state_dict(loader.state_dict())
    for batch, expected in zip(again, seen[3:], strict=False):
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_rows_that_are_cut_off_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = rows(40)
    text = data(tmp_path, given)
    text.setup()
    firsts = sorted(int(flags.nonzero()[0]) for _, flags in items(text))
    middle = firsts[len(firsts) // 2]
    short = data(tmp_path, given, window_tokens=middle)
    short.setup()
    left = [flags for _, flags in items(short)]
    assert len(left) == sum(first < middle for first in firsts) < len(firsts)
    assert all(bool(flags.any()) and len(flags) <= middle for flags in left)
    with pytest.raises(
        ValueError, match=r"`window_tokens` 20 cuts off the responses of all 36 rows"
    ):
        data(tmp_path, given, window_tokens=20).setup()


def items(text: InstructionData) -> list[tuple[Tensor, Tensor]]:
    part: Any = text.train_parts[0]
    return [part[n] for n in range(len(part))]


ROW = {"instruction": "Cut.", "input": "", "output": "Yes."}


@pytest.mark.parametrize(
    ("row", "template", "chat_template", "message"),
    [
        (ROW | {"output": " "}, Alpaca(), None, r"line 21 has no response: 'output' is empty"),
        ({"instruction": "Cut."}, Alpaca(), None, r"line 21 has no 'output', only 'instruction'"),
        (ROW | {"output": 3}, Alpaca(), None, r"line 21 holds int in 'output', not text"),
        (ROW | {"output": "\0"}, Alpaca(), None, r"line 21 holds a zero character"),
        ("text", Alpaca(), None, r"line 21 holds str, no object with fields"),
        (chat("Cut?"), Chat(), CHATML, r"line 21 has no response: no message of the assistant"),
        (ROW, Chat(), CHATML, r"line 21 has no list 'messages'"),
        (chat("Cut?", "Yes."), Chat(), None, r"`template` Chat needs a chat template"),
        (chat("Cut?", "Yes."), Chat(), NO_MARKER, r"has no marker of the assistant"),
        (chat("Cut?", "Yes."), Chat(), REFUSES, r"chat template: System role not supported"),
        (chat("Cut now?", "Yes."), Chat(), FORGETS, r"changes earlier messages"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(
    tmp_path: Path, row: Any, template: Template, chat_template: str | None, message: str
) -> None:
    good = chat("Cut?", "Yes.") if isinstance(template, Chat) and chat_template == CHATML else ROW
    found = [*[good] * 20, row] if chat_template in (None, CHATML) else [row]
    if isinstance(template, Chat) and chat_template is None:
        found = [row]
    with pytest.raises(ValueError, match=message):
        data(tmp_path, found, chat_template, template=template).setup()


def test_too_few_rows_to_hold_out_and_plain_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`train` has too few rows to hold out 0.1 of them"):
        data(tmp_path, rows(5)).setup()
    (tmp_path / "a.txt").write_text("A tree.")
    text = data(tmp_path, rows(5))
    text.train = str(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="plain text has no fields"):
        text.setup()


def test_another_template_or_packing_is_other_data(tmp_path: Path) -> None:
    one, swapped = data(tmp_path, rows(20)), Alpaca("output", "input", "instruction")
    with pytest.raises(ValueError, match="another configuration of InstructionData: `fingerprint`"):
        data(tmp_path, rows(20), packing=True).load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="another configuration of InstructionData: `fingerprint`"):
        data(tmp_path, rows(20), template=swapped).load_state_dict(one.state_dict())
