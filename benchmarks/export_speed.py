"""Speed of exported models with widths per block, compared with their FLOPs.

A random Llama is cut by random plans, with any widths and with aligned ones. In one run, in turns:

- dense: the model before pruning;
- ideal: a dense Llama of the same block FLOPs and the same heads, with uniform, narrower widths;
- ours: the exported folder, loaded;
- naive: a straightforward implementation, with an `index_select` before every projection, an
  out-of-place `index_add` after it, and indices that are moved to the device on every call.

With --cpu-time and one thread, prefill and decode are measured in processor seconds, which do not
depend on other programs or on how two threads share a layer.

Then the time and memory of loading, per byte of the file and over those of the dense model, and the
speed of surgery over that of copying the file.

All of the table on the CPU, and the one of a 7B on a GPU (the latter also with --compile):

    python -m benchmarks.export_speed --dtype float32 bfloat16
    python -m benchmarks.export_speed --dtype float32 bfloat16 --width 2048 --blocks 4 --mlp 5632
    python -m benchmarks.export_speed --width 4096 --blocks 32 --mlp 11008 --device cuda
        --dtype bfloat16 --batch 1 8 64 --keep 0.5
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.data import write_figures
from secateur.pruning.costs import Flops
from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.families import FAMILIES
from secateur.pruning.files.fingerprint import fingerprint
from secateur.pruning.files.headers import WEIGHTS
from secateur.pruning.measure.sizes import count
from secateur.pruning.measure.speed import measure_speed
from secateur.pruning.plan import Plan, plan_from_indices
from secateur.pruning.sites import find_sites
from secateur.pruning.widths.budget import Budget

HEAD_SIZE = 64
VOCABULARY = 512  # small: embeddings and head are not of interest
MULTIPLE = 64  # of aligned widths


def shape(width: int, mlp: int, blocks: int, heads: int) -> LlamaConfig:
    """A Llama of the given widths whose attention is that of the base model."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def random_plan(
    model: LlamaForCausalLM, folder: Path, keep: float, multiple: int, seed: int = 0
) -> Plan:
    """A plan on budget with widths that differ between blocks and sites, as in learned plans."""
    sites = find_sites(model, FAMILIES["llama"])
    generator = torch.Generator().manual_seed(seed)
    scores_N = torch.cat(
        [
            torch.rand(site.size, generator=generator) + 0.15 * torch.randn(1, generator=generator)
            for site in sites
        ]
    )
    budget = Budget(keep, Flops(), width_multiple=multiple)
    kept = budget.finalise(scores_N, sites, budget.cost.table(model))
    return plan_from_indices(model, fingerprint(folder), kept, {"scores": "random"})


def ideal_of(plan: Plan, config: LlamaConfig, flops: int) -> LlamaForCausalLM:
    """A dense Llama of the same block FLOPs and heads; the residual stream has the mean width.

    Its widths are multiples of 64 and of 8, which suit hardware.
    """
    widths = [w for s, w in zip(plan.sites, plan.widths, strict=True) if s.name != "mlp_mid"]
    stream = max(64, round(sum(widths) / len(widths) / 64) * 64)
    attention = 4 * stream * config.num_attention_heads * HEAD_SIZE
    per_block = flops / 2 / config.num_hidden_layers
    mlp = max(8, round((per_block - attention) / (3 * stream) / 8) * 8)
    heads, blocks = config.num_attention_heads, config.num_hidden_layers
    return LlamaForCausalLM(shape(stream, mlp, blocks, heads))


class _Select(nn.Module):
    """A projection that selects its input entries itself."""

    def __init__(self, linear: nn.Linear, index_W: Tensor) -> None:
        super().__init__()
        self.linear, self.index = linear, [index_W.cpu()]  # in a list: not a buffer

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        picked_BTW = hidden_BTD.index_select(-1, self.index[0].to(hidden_BTD.device))
        return self.linear(picked_BTW)


class _NaiveBlock(nn.Module):
    """A straightforward block of an exported model; it shares the narrow linear layers."""

    def __init__(self, block: Any, plan: Plan, number: int, size: int, eps: float) -> None:
        super().__init__()
        indices = {s.name: plan.index(s.block, s.name) for s in plan.sites if s.block == number}
        self.eps, self.self_attn, self.mlp = eps, block.self_attn, block.mlp
        self.out = [indices["attn_out"].cpu(), indices["mlp_out"].cpu()]
        for parent, names, site in (
            (self.self_attn, ("q_proj", "k_proj", "v_proj"), "attn_in"),
            (self.mlp, ("gate_proj", "up_proj"), "mlp_in"),
        ):
            for name in names:
                setattr(parent, name, _Select(getattr(parent, name), indices[site]))
        self.norms = nn.ParameterList()
        for norm, site in (
            (block.input_layernorm, "attn_in"),
            (block.post_attention_layernorm, "mlp_in"),
        ):
            weight_D = torch.zeros(size, dtype=norm.weight.dtype, device=norm.weight.device)
            index_W = indices[site].to(weight_D.device)
            self.norms.append(nn.Parameter(weight_D.index_copy(0, index_W, norm.weight.detach())))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        out_W = [index_W.to(hidden_states.device) for index_W in self.out]
        attended_BTW, _ = self.self_attn(hidden_states=self._norm(hidden_states, 0), **kwargs)
        hidden_BTD = hidden_states.index_add(-1, out_W[0], attended_BTW)
        return hidden_BTD.index_add(-1, out_W[1], self.mlp(self._norm(hidden_BTD, 1)))

    def _norm(self, hidden_BTD: Tensor, place: int) -> Tensor:
        wide_BTD = hidden_BTD.float()
        root_BT1 = torch.rsqrt(wide_BTD.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.norms[place] * (wide_BTD * root_BT1).to(hidden_BTD.dtype)


def naive_of(folder: Path, plan: Plan, dtype: torch.dtype) -> Any:
    """The exported model with straightforward blocks."""
    model = load(folder, dtype)
    size, eps = model.config.hidden_size, model.config.rms_norm_eps
    model.model.layers = nn.ModuleList(
        _NaiveBlock(block, plan, number, size, eps)
        for number, block in enumerate(model.model.layers)
    )
    return model


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The model in a folder, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


_LOADING = """
import sys, time
import torch
from transformers import AutoConfig, AutoModelForCausalLM

def status(name):  # kilobytes
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

def load():
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)

def touch(model):  # files are memory-mapped: a page is read on first access
    for parameter in model.parameters():
        parameter.detach().view(-1)[::256].sum()
    return model

config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.device("meta"):  # exclude the time of imports
    AutoModelForCausalLM.from_config(config, trust_remote_code=True)
open("/proc/self/clear_refs", "w").write("5")  # reset the peak
before = status("VmHWM")
model = touch(load())
peak = (status("VmHWM") - before) * 1024
times = []
for _ in range(5):
    start = time.perf_counter()
    touch(load())
    times.append(time.perf_counter() - start)
print(sorted(times)[2], peak)
"""


def loading(folder: Path) -> tuple[float, float]:
    """Seconds and peak bytes of loading a folder, in a fresh process; Linux only."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOADING, str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def loading_figures(dense: Path, small: Path) -> dict[str, float]:
    """Time and peak memory of loading, per byte of the file and over those of the dense model."""
    sizes = [(folder / WEIGHTS).stat().st_size for folder in (dense, small)]
    fraction = sizes[1] / sizes[0]
    (dense_seconds, dense_peak), (seconds, peak) = loading(dense), loading(small)
    return {
        "file_fraction": fraction,
        "load_seconds": seconds,
        "load_time_over_size": seconds / dense_seconds / fraction,
        "load_peak_over_file": peak / sizes[1],
        "load_memory_over_size": peak / dense_peak / fraction,
    }


def surgery_figures(base: Path, plan: Plan, scratch: Path) -> dict[str, float]:
    """Bytes of the base model that surgery processes per second, over those of a copy."""
    times: dict[str, list[float]] = {"copy": [], "surgery": []}
    for _ in range(5):
        start = time.perf_counter()
        shutil.copyfile(base / WEIGHTS, scratch / "copy")
        times["copy"].append(time.perf_counter() - start)
        start = time.perf_counter()
        prune_checkpoint(base, plan, scratch / "cut")
        times["surgery"].append(time.perf_counter() - start)
        (scratch / "copy").unlink()
        shutil.rmtree(scratch / "cut")
    copy, surgery = median(times["copy"]), median(times["surgery"])
    return {"surgery_seconds": surgery, "surgery_speed_over_copy": copy / surgery}


def check_equal(ours: Any, naive: Any, device: torch.device) -> None:
    """Check that the straightforward model computes the same."""
    tokens_BT = torch.arange(16, device=device)[None]
    with torch.inference_mode():
        ours_BTV, naive_BTV = (model(tokens_BT).logits.float() for model in (ours, naive))
    torch.testing.assert_close(naive_BTV, ours_BTV, atol=0.05 * float(ours_BTV.abs().max()), rtol=0)


def speed_figures(models: Mapping[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Prefill and decode of all models, ratios to dense and to ideal."""
    figures = {}
    clock = time.process_time if args.cpu_time else time.perf_counter
    settings: dict[str, Any] = {"repeats": args.repeats, "clock": clock}
    prefill = measure_speed(
        models, batch_size=4, prompt_tokens=args.prompt, new_tokens=2, **settings
    )
    seconds = {"prefill": {name: speed.prefill_seconds for name, speed in prefill.items()}}
    for batch in args.batch:
        decode = measure_speed(
            models, batch_size=batch, prompt_tokens=16, new_tokens=args.tokens, **settings
        )
        seconds[f"decode{batch}"] = {name: s.decode_seconds for name, s in decode.items()}
    for what, of in seconds.items():
        figures |= {f"{what}_ms_{name}": value * 1e3 for name, value in of.items()}
        figures |= {
            f"{what}_{name}_over_dense": of[name] / of["dense"] for name in ("ours", "naive")
        }
        figures |= {
            f"{what}_{name}_over_ideal": of[name] / of["ideal"] for name in ("ours", "naive")
        }
    return figures


def measure_plan(
    dense: Any, base: Path, scratch: Path, keep: float, multiple: int, args: argparse.Namespace
) -> dict[str, float]:
    """All figures of one plan."""
    plan = random_plan(dense, base, keep, multiple)
    dtype, device = dense.dtype, torch.device(args.device)
    prune_checkpoint(base, plan, scratch / "small")
    ours = load(scratch / "small", dtype)
    flops, full = (count(model).block_flops_per_token for model in (ours, dense))
    models = {
        "dense": dense,
        "ideal": ideal_of(plan, dense.config, flops).to(dtype).eval(),
        "ours": ours,
        "naive": naive_of(scratch / "small", plan, dtype),
    }
    ideal_flops = count(models["ideal"]).block_flops_per_token
    for model in models.values():
        model.to(device)
    check_equal(ours, models["naive"], device)
    if args.compile:
        for model in models.values():
            model.compile()
    figures = {"kept": flops / full, "ideal_flops_over_ours": ideal_flops / flops}
    figures |= speed_figures(models, args)
    figures["prefill_over_dense_minus_kept"] = figures["prefill_ours_over_dense"] - flops / full
    if args.device == "cpu" and not args.speed_only:
        figures |= loading_figures(base, scratch / "small")
        figures |= surgery_figures(base, plan, scratch)
    shutil.rmtree(scratch / "small")
    return figures


def worst(figures: Mapping[str, Any], widths: str, prefix: str, suffix: str) -> dict[str, float]:
    """The largest figure over the plans with such widths; empty if there is no such plan."""
    found = [
        value
        for key, value in figures.items()
        if f"_{widths}_{prefix}" in key and key.endswith(suffix)
    ]
    name = f"{prefix}_{suffix.removeprefix('ours_')}"
    name = name if widths == "aligned" else f"{name}_{widths}"
    return {name: max(found)} if found else {}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--width", type=int, default=1024, help="model width, a multiple of 64 (default: 1024)")
    add("--blocks", type=int, default=8, help="number of blocks (default: 8)")
    add("--mlp", type=int, default=2816, help="MLP width (default: 2816)")
    add("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.3], help="kept block FLOPs")
    add("--widths", nargs="+", choices=["random", "aligned"], default=["random", "aligned"])
    add("--dtype", nargs="+", default=["float32"], help="torch types, such as bfloat16")
    add("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes of the decode")
    add("--prompt", type=int, default=512, help="tokens of the prefill, of 4 sequences")
    add("--tokens", type=int, default=128, help="tokens of the decode")
    add("--repeats", type=int, default=5, help="timed turns of every model")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--device", default="cpu", help="torch device")
    add("--compile", action="store_true", help="torch.compile all models")
    add("--cpu-time", action="store_true", help="processor time; needs --threads 1")
    add("--speed-only", action="store_true", help="leave out loading and surgery")
    add("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.cpu_time and (args.threads != 1 or args.device != "cpu"):
        parser.error("--cpu-time needs --threads 1 and --device cpu: waiting threads count as well")
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name in args.dtype:
            torch.manual_seed(0)
            config = shape(args.width, args.mlp, args.blocks, args.width // HEAD_SIZE)
            dense = LlamaForCausalLM(config).to(getattr(torch, name)).eval()
            dense.save_pretrained(scratch / "base")
            for keep in args.keep:
                for widths in args.widths:
                    multiple = MULTIPLE if widths == "aligned" else 1
                    dense.to("cpu")
                    found = measure_plan(dense, scratch / "base", scratch, keep, multiple, args)
                    label = f"{name}_{keep}_{widths}"
                    figures |= {f"{label}_{key}": value for key, value in found.items()}
            shutil.rmtree(scratch / "base")
    summary: dict[str, float] = {}
    for widths in ("aligned", "random"):  # keys of aligned plans have no suffix
        summary |= worst(figures, widths, "prefill", "ours_over_ideal")
        summary |= worst(figures, widths, "decode", "ours_over_ideal")
        summary |= worst(figures, widths, "prefill", "over_dense_minus_kept")
    settings = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
    write_figures(summary | settings | figures, args.json)


if __name__ == "__main__":
    main()
