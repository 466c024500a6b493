from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.pruning.measure.speed import Speed, measure_speed
from tests.tiny import tiny_llama


def test_models_run_in_turns_with_a_cache() -> None:
    """One second passes at every look at the clock: 4 looks per run give known times."""
    models = {"dense": tiny_llama(), "pruned": tiny_llama(1).train()}
    calls: list[tuple[str, tuple[int, ...]]] = []
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: calls.append((name, tuple(kwargs["input_ids"].shape))),
            with_kwargs=True,
        )
    seconds = iter(range(1000))
    speeds = measure_speed(
        models,
        batch_size=2,
        prompt_tokens=5,
        new_tokens=3,
        repeats=2,
        clock=lambda: float(next(seconds)),
    )
    one_run = [(2, 5), (2, 1), (2, 1)]
    turns = ["dense", "pruned"] * 3
    assert calls == [(name, shape) for name in turns for shape in one_run]
    ranges = {
        "prefill_seconds": (1.0, 1.0),
        "first_token_seconds": (2.0, 2.0),
        "decode_seconds": (0.5, 0.5),
    }
    assert speeds["dense"] == speeds["pruned"] == Speed(1.0, 2.0, 0.5, 2 * 3 / 3, None, ranges)
    assert not models["dense"].training
    assert models["pruned"].training


def test_decoding_generates_what_transformers_generates() -> None:
    model = tiny_llama()
    tokens: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: tokens.append(kwargs["input_ids"]), with_kwargs=True
    )
    measure_speed({"dense": model}, batch_size=2, prompt_tokens=6, new_tokens=5, repeats=1)
    prompt, *rest = tokens[:5]
    ours = torch.cat([prompt, *rest], 1)
    theirs = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ours, theirs)


def test_a_larger_model_is_slower_to_prefill() -> None:
    sizes: dict[str, Any] = {"num_attention_heads": 8, "max_position_embeddings": 512}
    models = {
        "small": tiny_llama(hidden_size=32, intermediate_size=64, **sizes),
        "large": tiny_llama(hidden_size=256, intermediate_size=1024, **sizes),
    }
    speeds = measure_speed(models, prompt_tokens=256, new_tokens=4, repeats=3)
    assert speeds["large"].prefill_seconds > speeds["small"].prefill_seconds
    for own in speeds.values():
        assert 0 < own.prefill_seconds <= own.first_token_seconds
        assert own.decode_seconds > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counted on CUDA only")
def test_peak_memory_is_that_of_the_model_alone() -> None:
    models = {"dense": tiny_llama().cuda(), "other": tiny_llama(hidden_size=96).cuda()}
    speeds = measure_speed(models, prompt_tokens=8, new_tokens=4, repeats=1)
    alone = measure_speed({"dense": models["dense"]}, prompt_tokens=8, new_tokens=4, repeats=1)
    own = sum(p.numel() * p.element_size() for p in models["dense"].parameters())
    assert speeds["dense"].peak_memory_bytes == alone["dense"].peak_memory_bytes
    assert speeds["dense"].peak_memory_bytes > own


@pytest.mark.parametrize(
    "setting", [{"batch_size": 0}, {"prompt_tokens": 0}, {"new_tokens": 1}, {"repeats": 0}]
)
def test_settings_out_of_range_are_named(setting: dict[str, int]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"`{name}` must be .* or more, got {value}"):
        measure_speed({"dense": tiny_llama()}, **setting)


def test_no_model_is_told() -> None:
    with pytest.raises(ValueError, match="`models` must be 1 or more, got 0"):
        measure_speed({})
