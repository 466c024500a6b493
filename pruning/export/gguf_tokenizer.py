"""The tokenizer of a model folder, as the keys of a GGUF file.

llama.cpp has two kinds of tokenizers that language models of our families use: byte-level BPE, for
which it has named rules to split text into words, and SentencePiece's, which joins the pair of
pieces with the highest score. Other tokenizers are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer.json"

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Steps that split text into words, to the name of the rule in llama.cpp.
_SPLITTING: Mapping[tuple[str, ...], str] = {
    ("words and bytes",): "gpt-2",
    ("digits", "words and bytes"): "smollm",
    (_WORDS % r"\p{N}{1,3}", "bytes"): "llama-bpe",
    (_WORDS % r"\p{N}", "bytes"): "qwen2",
}


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> list[str]:
    """Write tokens, merges or scores, special tokens and the chat template.

    llama.cpp needs one token per row of the embeddings. Rows without a token get a name that no
    text contains. Added tokens without a row, such as the one for images of a Gemma 3, are left
    out: no text of the model has them.

    Args:
        writer: Writer that stores the keys.
        folder: Model folder with tokenizer.json.
        vocab_size: Rows of the embeddings.

    Returns:
        Notes for the user, one sentence each.

    Raises:
        ValueError: There is no tokenizer, llama.cpp does not support its kind, or text gives tokens
            that the model has no embedding for.
    """
    if not (folder / TOKENIZER).is_file():
        raise ValueError(
            f"{folder} holds no {TOKENIZER}, which llama.cpp needs to read text. Save the "
            "tokenizer of the base model into it."
        )
    said = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    model = said["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"{folder / TOKENIZER} is a {model['type']} tokenizer; only BPE can be written for "
            "llama.cpp."
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    above = _above(said, tokenizer, vocab_size, folder)
    tokens, types = _tokens(said, vocab_size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_prepends_space(said))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_of_splitting(said["pre_tokenizer"], folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=vocab_size)
    special.add_special_token = _added_around_text(tokenizer, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)
    names = ", ".join(above)
    return [f"The model has no embedding of {names}: left out of the file."] if above else []


def _above(
    said: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, vocab_size: int, folder: Path
) -> list[str]:
    """Added tokens that have no embedding.

    Raises:
        ValueError: Other tokens have none: those of words, or that begin or end a text.
    """
    needed: dict[str, int] = dict(said["model"]["vocab"])
    ends = {t for t in (tokenizer.bos_token, tokenizer.eos_token) if t is not None}
    found = {token["content"]: token["id"] for token in said["added_tokens"]}
    needed |= {token: found.pop(token) for token in ends & found.keys()}
    token, largest = max(needed.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"{folder / TOKENIZER} has token {largest} ({token!r}) and the model {vocab_size} "
            "embeddings; give it the tokenizer that it was trained with."
        )
    return [token for token, number in found.items() if number >= vocab_size]


def _tokens(said: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Token and its kind, by id."""
    vocabulary: dict[str, int] = said["model"]["vocab"]
    added = {token["content"]: token for token in said["added_tokens"]}
    by_id = {number: token for token, number in vocabulary.items()}
    by_id |= {token["id"]: content for content, token in added.items()}

    def kind(token: str) -> TokenType:
        if token == said["model"].get("unk_token"):
            return TokenType.UNKNOWN
        if token in added:
            return TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
        is_byte = said["model"].get("byte_fallback") and len(token) == 6 and token[:3] == "<0x"
        return TokenType.BYTE if is_byte else TokenType.NORMAL

    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    types = [kind(t) if n in by_id else TokenType.UNUSED for n, t in enumerate(tokens)]
    return tokens, types


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Scores by which the earliest merge has the highest score."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault("".join(pair), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _prepends_space(said: Mapping[str, Any]) -> bool:
    """Test whether the tokenizer adds a space before a text."""
    steps = _flat(said.get("normalizer"), "normalizers")
    words = _flat(said.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Prepend" for step in steps) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in words
    )


def _name_of_splitting(pre_tokenizer: Mapping[str, Any] | None, folder: Path) -> str:
    steps = tuple(map(_step, _flat(pre_tokenizer, "pretokenizers")))
    if steps not in _SPLITTING:
        raise ValueError(
            f"{folder / TOKENIZER} splits text into words by a rule that is not known here to be "
            f"in llama.cpp: {steps}. Known are the rules of {', '.join(_SPLITTING.values())}."
        )
    return _SPLITTING[steps]


def _step(step: Mapping[str, Any]) -> str:
    """The name of a splitting step in `_SPLITTING`; for an unknown step, its own text."""
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return "words and bytes" if step.get("use_regex", True) else "bytes"
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    if step["type"] == "Split" and step.get("behavior") == "Isolated":
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def _flat(steps: Mapping[str, Any] | None, name: str) -> list[Any]:
    """The steps of a sequence, or the single step."""
    if steps is None:
        return []
    return list(steps[name]) if steps["type"] == "Sequence" else [steps]


def _added_around_text(
    tokenizer: PreTrainedTokenizerFast, special: Mapping[str, int]
) -> dict[str, bool]:
    """Which special tokens the tokenizer adds around a text, found by encoding one."""
    ids = tokenizer("a").input_ids
    return {
        "bos": ids[0] == special.get("bos"),
        "eos": len(ids) > 1 and ids[-1] == special.get("eos"),
    }
