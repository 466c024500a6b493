"""A process that has the packages of this one and cannot see this repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

_ALONE = """
import importlib.util
assert importlib.util.find_spec("pruning") is None, "the repository can be seen"
"""


def by_its_own_code(folder: Path, auto_class: str = "AutoModelForCausalLM") -> Any:
    """A model by the code in its folder, as a process that does not know Secateur loads it."""
    classes = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    return get_class_from_dynamic_module(classes[auto_class], folder).from_pretrained(folder)


def run_as_stranger(program: str, *arguments: Path | str, folder: Path) -> None:
    """Run a Python program as somebody would who was given nothing but a model folder.

    Args:
        program: The source; it finds `arguments` from `sys.argv[1]` on.
        arguments: What it is given.
        folder: Working directory, which also takes the cache of modules.
    """
    # In isolated mode neither the working directory nor PYTHONPATH is searched; `site` is switched
    # off where this repository is installed in place, and the packages are named instead.
    packages = dict.fromkeys(str(Path(m.__file__).parents[1]) for m in (transformers, torch))
    path = f"import sys\nsys.path += {list(packages)}\n"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", path + _ALONE + program, *map(str, arguments)],
        cwd=folder,
        env=environment | {"HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
