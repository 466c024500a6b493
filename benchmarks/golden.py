"""Record losses, plans and exported models before a refactoring, compare them after it.

    python -m benchmarks.golden record golden.json      # before
    python -m benchmarks.golden compare golden.json     # after, on the same machine

Runs `train.py fit` on a small random model of every family, and on stories260K if SECATEUR_DATA
names the folder of models; each run is a separate process with one thread. It records the figures
of metrics.csv as text, a SHA-256 of every tensor of the plan and of the exported model, and the
fields of the exported config.json. `compare` makes the same runs, prints the differences and exits
with 1 if there are any. Both take a few minutes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Nothing of this project is imported: the script must work after packages are moved.
REPOSITORY = Path(__file__).parents[1]
WORDS = "cut prune twig bud bark root sap bough stem leaf thorn graft crown knot shoot fork"

SHAPE = {"vocab_size": 260, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6}
SHAPE |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {"intermediate_size": 36, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED | {"tie_word_embeddings": False},
    "mistral": GROUPED | {"head_dim": 4, "sliding_window": 5},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 10},
    "gemma2": GROUPED | {"head_dim": 6, "sliding_window": 5},
    "gemma3_text": GROUPED | {"head_dim": 6, "sliding_window": 5},
    "opt": {"ffn_dim": 36},
    "phi": {"intermediate_size": 36},
}

ADD, SET = "--trainer.callbacks+=", "--trainer.callbacks."
TRAIN, EXPORT = ["--model=CausalLM", "--model.warmup_steps=2"], ADD + "ExportModel"
BLOCKS = [ADD + "PruneBlocks", SET + "target=Blocks", SET + "target.count=1"]
WEIGHTS = [ADD + "PruneWeights", SET + "pattern=NM", SET + "pattern.n=2", SET + "pattern.m=4"]
KINDS = {  # the last three of ten steps of mask learning are those after settling
    "masks": ["--model=MaskLearning", ADD + "AnnealSparsity", EXPORT, "--trainer.max_steps=10"],
    "blocks": [*TRAIN, *BLOCKS, EXPORT, "--trainer.max_steps=4"],
    "weights": [*TRAIN, *WEIGHTS, EXPORT, "--trainer.max_steps=0"],
    "pretraining": [*TRAIN, "--trainer.max_steps=10"],
}
ALL_KINDS = ("llama", "gemma2", "stories260K")  # other families run only the first two kinds
ALL_RUNS = ["--data=TextData", "--data.window_tokens=16", "--data.batch_size=4"]
ALL_RUNS += ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]


def make_inputs(folder: Path) -> dict[str, Path]:
    """Write a text and a small model of every family; return the model folders by name."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS.split(), k=40)) for _ in range(60)]
    (folder / "text.json").write_text(json.dumps(texts), encoding="utf-8")
    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    for family, fields in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | fields))
        with torch.no_grad():  # norms of one and biases of zero would hide mistakes
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.save_pretrained(folder / family)
        fast.save_pretrained(folder / family)
    data = os.environ.get("SECATEUR_DATA")
    stories = {"stories260K": Path(data) / "models" / "stories260K"} if data else {}
    return {family: folder / family for family in FAMILIES} | stories


def run(kind: str, base: Path, text: Path, root: Path) -> dict[str, Any]:
    """Make one run with its outputs below `root`; return its figures."""
    model = [f"--model.base={base}"]
    if kind == "pretraining":
        architecture = (base / "config.json").read_text(encoding="utf-8")
        model = [f"--model.architecture={architecture}", f"--data.tokenizer={base}"]
    places = [f"--data.train={text}", f"--data.cache_dir={root / 'cache'}"]
    places.append(f"--trainer.default_root_dir={root}")
    command = [sys.executable, "train.py", "fit", *ALL_RUNS, *KINDS[kind], *model, *places]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=REPOSITORY, env=one_thread, capture_output=True, text=True)
    if ended.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}\n{ended.stderr[-3000:]}")
    return dict(figures(root))


def figures(root: Path) -> Iterator[tuple[str, Any]]:
    """Names and values of the figures of a finished run."""
    for path in root.glob("metrics/**/metrics.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                names = sorted(key for key in row if row[key] and key not in ("step", "epoch"))
                yield from ((f"step {row['step']} {name}", row[name]) for name in names)
    for path in (path for part in ("plan", "model") for path in root.glob(f"{part}/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                tensor = file.get_tensor(name)
                content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                kind = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
                yield f"{path.parent.name} {name}", hashlib.sha256(kind + content).hexdigest()
    for path in root.glob("model/config.json"):
        fields = json.loads(path.read_text(encoding="utf-8"))
        yield from ((f"config {name}", value) for name, value in fields.items())


def measure(processes: int) -> dict[str, Any]:
    """Make all runs, `processes` at once; return their figures."""
    found = {}
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(processes) as pool:
        folder, text = Path(place), Path(place) / "text.json"
        bases = make_inputs(folder)
        runs = [(n, k) for n in bases for k in KINDS if n in ALL_KINDS or k in ("masks", "blocks")]

        def make(name: str, kind: str) -> dict[str, Any]:
            return run(kind, bases[name], text, folder / "runs" / name / kind)

        for (name, kind), made in zip(runs, pool.map(make, *zip(*runs, strict=True)), strict=True):
            found |= {f"{name} {kind}: {key}": value for key, value in made.items()}
            print(f"{name} {kind}: done", flush=True)
    return found


def main() -> None:
    """Record, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("record", "compare"), help="write FILE, or read it")
    parser.add_argument("file", type=Path, metavar="FILE", help="one flat JSON object")
    parser.add_argument("--processes", type=int, default=2, help="runs at once (2)")
    args = parser.parse_args()
    before = json.loads(args.file.read_text(encoding="utf-8")) if args.action == "compare" else {}
    now = measure(args.processes)
    if args.action == "record":
        args.file.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        return
    differ = [key for key in before | now if before.get(key) != now.get(key)]
    for key in differ:
        print(f"{key}: {before.get(key, 'missing')} before, {now.get(key, 'missing')} now")
    print(f"{len(before | now)} figures compared, {len(differ)} differ.")
    raise SystemExit(1 if differ else 0)


if __name__ == "__main__":
    main()
