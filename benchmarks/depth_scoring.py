"""Time and memory of depth pruning against straightforward implementations.

Scoring: perplexity without each block of a random Llama of 16 blocks, with stored hidden states,
against one full forward pass per block with that block bypassed; interleaved, medians of wall
seconds, and of CPU seconds of the process, which depend less on other programs. Both give the same
scores. By calls of blocks alone, L (L - 1) against L (L + 1) / 2, 16 blocks allow 1.76.

Memory of Taylor scores: computed from shapes, at this size and at that of a 7B model;
tests/pruning/depth compares it with measured memory at small size.

Latency: the model without a quarter of its blocks against the dense one, prefill and decode, beside
the ideal, which is the fraction of the parameters that multiply (blocks and output head).

Surgery: peak memory growth of a separate process while it removes a block from a checkpoint in one
and in many shards (Linux only).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.data import write_figures
from secateur.pruning.depth import Perplexity, bypassed, peak_bytes, remove_blocks
from secateur.pruning.export.rewrite import prune_blocks
from secateur.pruning.measure.perplexity import perplexity
from secateur.pruning.measure.sizes import count
from secateur.pruning.measure.speed import measure_speed

_CLOCKS = {"_s": time.perf_counter, "_cpu_s": time.process_time}
SEVEN_B = LlamaConfig()  # the defaults are those of LLaMA 7B


def random_llama(args: argparse.Namespace) -> Any:
    """A Llama with random weights from a fixed seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=args.blocks,
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        vocab_size=args.vocabulary,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def plain_scores(model: Any, windows_NT: Tensor) -> list[float]:
    """Perplexity without each block: one full forward pass for each."""
    values = []
    for block in range(model.config.num_hidden_layers):
        with bypassed(model, [block]):
            values.append(perplexity(model, windows_NT).value)
    return values


def scoring(model: Any, windows_NT: Tensor, repeats: int) -> dict[str, float]:
    """Seconds of both ways of scoring, and the difference of their scores."""
    ways: dict[str, Callable[[], list[float]]] = {
        "plain": lambda: plain_scores(model, windows_NT),
        "kept_states": lambda: Perplexity()(model, windows_NT).values.tolist(),
    }
    times: dict[str, list[float]] = {f"{way}{clock}": [] for way in ways for clock in _CLOCKS}
    worst = 0.0
    for repeat in range(repeats + 1):
        found = {}
        for way, scores in ways.items():
            start = {clock: now() for clock, now in _CLOCKS.items()}
            found[way] = scores()
            if repeat:
                for clock, now in _CLOCKS.items():
                    times[f"{way}{clock}"].append(now() - start[clock])
        pairs = zip(found["kept_states"], found["plain"], strict=True)
        worst = max(worst, *(abs(ours - plain) / plain for ours, plain in pairs))
    medians = {name: statistics.median(own) for name, own in times.items()}
    config, (count_N, window) = model.config, windows_NT.shape
    state = min(8, count_N) * window * config.hidden_size * model.dtype.itemsize
    return {
        "perplexity_speedup": medians["plain_s"] / medians["kept_states_s"],
        "perplexity_speedup_cpu": medians["plain_cpu_s"] / medians["kept_states_cpu_s"],
        **{f"perplexity_{name}": seconds for name, seconds in medians.items()},
        "perplexity_largest_relative_difference": worst,
        "perplexity_states_mb": config.num_hidden_layers * state / 1e6,
        "weights_mb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
    }


def latency(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """The dense model against the one without the second quarter of its blocks."""
    short, gone = random_llama(args), range(args.blocks // 4, args.blocks // 2)
    remove_blocks(short, gone)
    speeds = measure_speed(
        {"dense": model, "short": short}, prompt_tokens=256, new_tokens=24, repeats=args.repeats
    )
    dense, pruned = speeds["dense"], speeds["short"]
    flops = [count(m).flops_per_token(0) for m in (short, model)]
    return {
        "prefill_over_dense": pruned.prefill_seconds / dense.prefill_seconds,
        "decode_over_dense": pruned.decode_seconds / dense.decode_seconds,
        "ideal_over_dense": flops[0] / flops[1],
    }


def surgery_growth_mb(base: Path, folder: Path) -> float:
    """Peak memory growth in MB of a fresh process that removes block 1."""
    queue: Any = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(
        target=_remove_and_report, args=(base, folder, queue)
    )
    process.start()
    grown: float = queue.get()
    process.join()
    return grown


def _remove_and_report(base: Path, folder: Path, queue: Any) -> None:
    prune_blocks(base, folder, remove=[1])  # warm up: imports and caches
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status_mb("VmRSS")
    prune_blocks(base, folder, remove=[1])
    queue.put(_status_mb("VmHWM") - before)


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def surgery(model: Any) -> dict[str, float]:
    """Growth of the memory with one shard and with many."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        for name, shard in (("one", "100GB"), ("many", "2MB")):
            model.save_pretrained(folder / name, max_shard_size=shard)
            figures[f"surgery_{name}_shards"] = len(list((folder / name).glob("*.safetensors")))
            figures[f"surgery_{name}_growth_mb"] = surgery_growth_mb(
                folder / name, folder / f"short_{name}"
            )
    return figures


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=16, help="blocks of the random model")
    parser.add_argument("--width", type=int, default=256, help="hidden size, a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=2048, help="entries of the vocabulary")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows")
    parser.add_argument("--window_tokens", type=int, default=128, help="tokens of a window")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved timed pairs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = random_llama(args)
    generator = torch.Generator().manual_seed(0)
    shape = (args.windows, args.window_tokens)
    windows_NT = torch.randint(args.vocabulary, shape, generator=generator)
    figures: dict[str, Any] = scoring(model, windows_NT, args.repeats)
    here, seven = peak_bytes(model.config, *shape, dtype=model.dtype), peak_bytes(SEVEN_B, 10, 128)
    figures |= {
        "taylor_over_weights": here.total / here.weights,
        "taylor_7b_bf16_10x128_gb": seven.total / 1e9,
        "taylor_7b_bf16_128x256_gb": peak_bytes(SEVEN_B, 128, 256).total / 1e9,
        "taylor_7b_gradients_gb": seven.gradients / 1e9,
    }
    figures |= latency(model, args) | surgery(model)
    write_figures(figures | {"blocks": args.blocks, "threads": args.threads}, args.json)


if __name__ == "__main__":
    main()
