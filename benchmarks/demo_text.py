"""Text that is part of every CPython, and a tokenizer trained on it, for `make demo`.

The text is the language reference in `pydoc_data` and the docstrings of the standard library,
one file per topic or module.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def reference_texts() -> dict[str, str]:
    """Topics of the language reference, by name."""
    return {f"topic_{name}": text for name, text in topics.items()}


def docstring_texts() -> dict[str, str]:
    """All docstrings of every module of the standard library with long docstrings."""
    texts = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        found = [
            ast.get_docstring(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        text = "\n\n".join(docstring for docstring in found if docstring)
        if len(text) > 200:
            texts["module_" + "_".join(path.relative_to(sysconfig.get_path("stdlib")).parts)] = text
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds BOS before every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def main() -> None:
    """Write `text/*.txt` and `tokenizer/` below a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens of the tokenizer")
    args = parser.parse_args()
    texts = reference_texts() | docstring_texts()
    (args.folder / "text").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (args.folder / "text" / f"{name.removesuffix('.py')}.txt").write_text(
            text, encoding="utf-8"
        )
    train_tokenizer(list(texts.values()), args.vocabulary).save_pretrained(
        args.folder / "tokenizer"
    )
    characters = sum(map(len, texts.values()))
    print(f"{len(texts)} documents, {characters / 1e6:.1f} M characters in {args.folder / 'text'}")


if __name__ == "__main__":
    main()
