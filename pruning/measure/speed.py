"""Speed of models in one run: prefill, decode with a cache, time to first token, peak memory.

Models are timed in turns (A B A B ...), so that a machine that slows down affects all of them, and
medians are reported. The decoding loop is our own, so that the model is timed and not a generation
library.

Legend: B = sequences of the batch, T = tokens of the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from secateur.pruning.modes import evaluation
from secateur.pruning.progress import tracked


@dataclass(frozen=True)
class Speed:
    """Speed of a model, medians over the repeats.

    Args:
        prefill_seconds: Forward pass over the whole prompt, logits of its last token only.
        first_token_seconds: Prefill, choice of the first token, and its copy to the host.
        decode_seconds: One further token of every sequence, with the cache.
        tokens_per_second: New tokens of all sequences over the time from prompt to last token.
        peak_memory_bytes: Peak memory of the model, its cache and activations on CUDA; None on the
            CPU, where no allocator counts.
        ranges: Name of a figure in seconds to its shortest and longest time over the repeats.
    """

    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int | None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def measure_speed(
    models: Mapping[str, Any],
    batch_size: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repeats: int = 5,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Speed]:
    """Time models against each other on one random prompt, greedy decoding.

    Args:
        models: Name to causal language model; they share a vocabulary and fit in memory together.
        batch_size: Sequences per batch, 1 or more.
        prompt_tokens: Tokens of the prompt, 1 or more.
        new_tokens: Tokens to generate, 2 or more: the first belongs to the prefill.
        repeats: Timed turns of every model, 1 or more, after one that is not counted.
        seed: Seed of the prompt.
        clock: Function that returns the time in seconds. On a shared CPU, `time.process_time`
            counts only the work of this process; use one thread, since waiting threads count as
            well.

    Raises:
        ValueError: A setting is out of its range, or there is no model.
    """
    for name, value, least in (
        ("models", len(models), 1),
        ("batch_size", batch_size, 1),
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be {least} or more, got {value}.")
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(seed)
    prompt_BT = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator)
    runs: dict[str, list[_Run]] = {name: [] for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluation(model))
        for turn in tracked(range(repeats + 1), "Measuring speed"):
            for name, model in models.items():
                run = _generate(model, prompt_BT, new_tokens, clock)
                if turn > 0:
                    runs[name].append(run)
    return {name: _summary(own, batch_size, new_tokens) for name, own in runs.items()}


@dataclass(frozen=True)
class _Run:
    prefill: float
    first_token: float
    total: float
    peak_memory: int | None


@torch.inference_mode()
def _generate(
    model: Any,
    prompt_BT: Int[Tensor, "B T"],
    new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> _Run:
    device = next(model.parameters()).device
    input_BT = prompt_BT.to(device)
    cache = DynamicCache(config=model.config)
    others = _start_memory(model, device)
    begin = now(clock, device)
    logits = model(
        input_ids=input_BT, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    prefilled = now(clock, device)
    next_B1 = logits[:, -1:].argmax(-1)
    next_B1.tolist()  # as in a server that streams its output
    first = now(clock, device)
    for _ in range(new_tokens - 1):
        logits = model(input_ids=next_B1, past_key_values=cache, use_cache=True).logits
        next_B1 = logits[:, -1:].argmax(-1)
    end = now(clock, device)
    assert cache.get_seq_length() == prompt_BT.shape[1] + new_tokens - 1
    peak = torch.cuda.max_memory_allocated(device) - others if others is not None else None
    return _Run(prefilled - begin, first - begin, end - begin, peak)


def _start_memory(model: Any, device: torch.device) -> int | None:
    """Start to track memory; return the bytes that are allocated besides the model."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    tensors = [*model.parameters(), *model.buffers()]
    own: dict[int, int] = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors
    }
    allocated: int = torch.cuda.memory_allocated(device)
    return allocated - sum(own.values())


def now(clock: Callable[[], float], device: torch.device) -> float:
    """The time in seconds, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def _summary(runs: list[_Run], batch_size: int, new_tokens: int) -> Speed:
    peaks = [run.peak_memory for run in runs if run.peak_memory is not None]
    times = {
        "prefill_seconds": [run.prefill for run in runs],
        "first_token_seconds": [run.first_token for run in runs],
        "decode_seconds": [(run.total - run.first_token) / (new_tokens - 1) for run in runs],
    }
    return Speed(
        **{name: median(own) for name, own in times.items()},
        tokens_per_second=median(batch_size * new_tokens / run.total for run in runs),
        peak_memory_bytes=max(peaks) if peaks else None,
        ranges={name: (min(own), max(own)) for name, own in times.items()},
    )
