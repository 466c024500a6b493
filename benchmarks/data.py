"""Models and texts of the measurements, and the protocol for reading texts.

The environment variable SECATEUR_DATA names the folder with models/ and text/.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from secateur.pruning.measure.perplexity import cut_windows

WINDOW_TOKENS = 256


def data_folder() -> Path:
    """The folder named by SECATEUR_DATA.

    Raises:
        SystemExit: The variable is not set to a folder.
    """
    folder = Path(os.environ.get("SECATEUR_DATA", ""))
    if not os.environ.get("SECATEUR_DATA") or not (folder / "text").is_dir():
        raise SystemExit("Set SECATEUR_DATA to the folder with models/ and text/.")
    return folder


def evaluation_windows(
    model: str, first: int | None = None, window_tokens: int = WINDOW_TOKENS
) -> dict[str, Tensor]:
    """Windows (N, T) of the three evaluation texts.

    Each text is tokenised once, one BOS at its start, and cut into windows without overlap; the
    remainder is dropped.

    Args:
        model: Folder of the model whose tokenizer is used.
        first: Number of windows per text; None uses all.
        window_tokens: Tokens of a window, 2 or more.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    text = data_folder() / "text"
    texts = {
        "c4": "\n\n".join(json.loads((text / "c4_heldout.json").read_text())),
        "wikitext2": (text / "wikitext2_raw_test.txt").read_text()[:300_000],
        "tinystories": (text / "tinystories_val.txt").read_text(),
    }
    return {
        name: cut_windows(tokenizer(content)["input_ids"], window_tokens)[:first]
        for name, content in texts.items()
    }


def mask_training_windows(model: str, seed: int = 0, window_tokens: int = WINDOW_TOKENS) -> Tensor:
    """Windows (N, T) of the mask-training text, shuffled by a seed.

    Args:
        model: Folder of the model whose tokenizer is used; every document begins with its BOS.
        seed: Seed of the shuffle.
        window_tokens: Tokens of a window, 2 or more.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    documents = json.loads((data_folder() / "text" / "c4_masktrain.json").read_text())
    ids = [token for document in documents for token in tokenizer(document)["input_ids"]]
    windows_NT = cut_windows(ids, window_tokens)
    return windows_NT[
        torch.randperm(len(windows_NT), generator=torch.Generator().manual_seed(seed))
    ]


def write_figures(figures: dict[str, Any], path: Path | None) -> None:
    """Print the figures, and write them as one flat JSON object if a path is given."""
    text = json.dumps(figures, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
