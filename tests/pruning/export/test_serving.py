"""What servers with a transformers backend ask of a model folder, as far as it needs no server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from secateur.pruning.export.rewrite import prune_checkpoint
from secateur.pruning.families import FAMILIES
from tests.pruning.export.plans import uneven_plan
from tests.stranger import by_its_own_code
from tests.tiny import VOCABULARY, tiny_family_folder

TOKENS_BT = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One exported folder per family; nothing may write there."""
    made = {}
    for family in FAMILIES:
        path = tmp_path_factory.mktemp(family)
        base = tiny_family_folder(path / "base", family)
        prune_checkpoint(base, uneven_plan(base), path / "small")
        made[family] = path / "small"
    return made


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def base_model(folder: Path) -> Any:
    return by_its_own_code(folder, "AutoModel")


def blocks_in(model: nn.Module) -> list[nn.Module]:
    """The blocks of a base model: its one list of modules."""
    (blocks,) = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return list(blocks)


def test_the_configuration_names_the_base_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert type(base_model(folder)).__name__ == config["auto_map"]["AutoModel"].split(".")[1]


@torch.no_grad()
def test_a_registered_attention_gets_every_call_and_every_keyword(folder: Path) -> None:
    seen: list[tuple[int, int]] = []

    def attention(
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        mark: int,
        scaling: float,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention from its equation."""
        seen.append((module.layer_idx, mark))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scaling
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        past = mask if mask is not None else torch.ones(scores.shape[-2:]).tril().bool()
        mixed = scores.masked_fill(~past, -torch.inf).softmax(-1) @ v
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register("of_a_test", attention)
    AttentionMaskInterface.register("of_a_test", sdpa_mask)
    base = base_model(folder)
    assert type(base)._supports_attention_backend
    assert base.is_backend_compatible()
    base.set_attn_implementation("eager")  # the only one that caps scores
    plain_BTD = base(TOKENS_BT).last_hidden_state
    base.set_attn_implementation("of_a_test")
    other_BTD = base(TOKENS_BT, mark=7).last_hidden_state
    assert seen == [(layer, 7) for layer in range(4)]
    torch.testing.assert_close(other_BTD, plain_BTD, atol=1e-3, rtol=0)


def test_a_language_model_adds_a_head_and_nothing_else(folder: Path) -> None:
    whole = by_its_own_code(folder)
    base = base_model(folder)
    state = {f"model.{name}": tensor for name, tensor in base.state_dict().items()}
    assert whole.state_dict().keys() - state.keys() <= {"lm_head.weight", "lm_head.bias"}
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in state.items())


class _Tracer(fx.Tracer):
    """Traces blocks around their attention, whose function is the server's own."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name.endswith(".self_attn") or super().is_leaf_module(module, name)


@torch.no_grad()
def test_blocks_can_be_traced(folder: Path) -> None:
    blocks: Any = blocks_in(base_model(folder))
    for block in blocks:
        block.self_attn = _Mixing(block.self_attn)
    stack = nn.Sequential(*blocks)
    graph = _Tracer().trace(stack)
    traced = fx.GraphModule(stack, graph)
    # Other batches and lengths than any that was seen: no shape was written into the graph.
    for shape in ((2, 5, 24), (1, 9, 24)):
        hidden_BTD = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(traced(hidden_BTD), stack(hidden_BTD), atol=0, rtol=0)
    # Nothing moves to a device and no shape depends on data: graphs can be recorded.
    called = {str(node.target) for node in graph.nodes if node.op == "call_method"}
    assert not called & {"cuda", "cpu", "nonzero", "item", "tolist", "numpy"}
    moved = [arg for node in graph.nodes if node.target == "to" for arg in node.args[1:]]
    assert not [arg for arg in moved if isinstance(arg, torch.device | str)]


class _Mixing(nn.Module):
    """The projections of an attention, with the mean of the past in the place of its scores."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        q, v = self.attention.q_proj(hidden_states), self.attention.v_proj(hidden_states)
        v = v.cumsum(1).repeat(1, 1, q.shape[-1] // v.shape[-1])
        names = ("o_proj", "out_proj", "dense")
        (output,) = (getattr(self.attention, n) for n in names if hasattr(self.attention, n))
        return output(q.tanh() * v), None


def test_norms_that_gather_do_not_look_like_plain_norms(folder: Path) -> None:
    # Servers replace modules whose class is called ...RMSNorm by a kernel for the full width.
    base = base_model(folder)
    narrow = [
        module
        for block in blocks_in(base)
        for module in block.modules()
        if "secateur_" in type(module).__module__.rpartition(".")[2] and hasattr(module, "eps")
    ]
    assert bool(narrow) == bool(FAMILIES[base.config.model_type.removeprefix("secateur_")].norms)
    assert not [module for module in narrow if type(module).__name__.endswith("Norm")]


def test_linear_layers_are_stock_and_bring_their_own_sizes(folder: Path) -> None:
    base = base_model(folder)
    family = FAMILIES[base.config.model_type.removeprefix("secateur_")]
    for block, widths in zip(blocks_in(base), base.config.block_widths, strict=True):
        for projection in family.projections:
            linear = block.get_submodule(projection.path)
            assert type(linear) is nn.Linear
            assert linear.in_features == widths.get(projection.input, linear.in_features)
            assert linear.weight.shape == (linear.out_features, linear.in_features)


def test_parallel_plans_are_those_of_the_family(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    family, tied = config.model_type.removeprefix("secateur_"), config.tie_word_embeddings
    stock = AutoConfig.for_model(family, tie_word_embeddings=tied)
    assert config.base_model_tp_plan == stock.base_model_tp_plan
    assert config.base_model_pp_plan == stock.base_model_pp_plan


def test_on_the_meta_device_it_has_shapes_and_no_memory(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert isinstance(model, PreTrainedModel)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    shapes = {name: tensor.shape for name, tensor in loaded.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_the_cache_is_uniform(folder: Path) -> None:
    base = base_model(folder)
    cache = base(TOKENS_BT, use_cache=True).past_key_values
    assert len({(k.shape[1], k.shape[-1]) for k in (layer.keys for layer in cache.layers)}) == 1


def test_devices_are_assigned_by_whole_blocks(folder: Path) -> None:
    base = base_model(folder)
    assert type(blocks_in(base)[0]).__name__ in base._no_split_modules


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_in_one_graph(folder: Path) -> None:
    small = by_its_own_code(folder)
    torch.compiler.reset()
    compiled: Any = torch.compile(small, fullgraph=True, backend="aot_eager")
    found_BTV = compiled(TOKENS_BT, use_cache=False).logits
    torch.testing.assert_close(found_BTV, small(TOKENS_BT).logits, atol=1e-3, rtol=0)
