from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn
from transformers import GPT2Config, PreTrainedConfig

from secateur.pruning import families
from secateur.pruning.families import FAMILIES, blocks_of, family_of, skeleton
from secateur.pruning.modelling import config_class, narrow_type
from secateur.pruning.sites import find_sites
from tests.tiny import VARIANTS, tiny_config, tiny_llama_config

CASES = [
    (name, tiny_config(name, **overrides))
    for name, variants in VARIANTS.items()
    for overrides in variants.values()
]


def test_an_unknown_family_says_what_is_known_and_what_to_do() -> None:
    with pytest.raises(ValueError, match="'gpt2' is not a known family; known are") as error:
        family_of(GPT2Config())
    for part in (*FAMILIES, "pruning/families.py", "CONTRIBUTING.md"):
        assert part in str(error.value)


def test_a_refused_member_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(FAMILIES["llama"], refuse=lambda config: "it is too small")
    monkeypatch.setattr(families, "FAMILIES", {"llama": row})
    with pytest.raises(ValueError, match="llama model cannot be pruned: it is too small"):
        family_of(tiny_llama_config())


@pytest.mark.parametrize(("name", "config"), CASES)
def test_a_row_agrees_with_its_model(name: str, config: PreTrainedConfig) -> None:
    family = family_of(config)
    assert family.model_type == name == config.model_type
    model = skeleton(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    blocks = blocks_of(model, family)
    assert len(blocks) == config.num_hidden_layers
    for block in blocks:
        for point in family.gates.values():
            assert isinstance(block.get_submodule(point.path), nn.Module)
        for norm in family.norms:
            assert block.get_submodule(norm.path).weight is not None
        linears = {path for path, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert linears == {projection.path for projection in family.projections}


@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_tensor_of_a_site_has_the_size_of_the_site(
    name: str, config: PreTrainedConfig
) -> None:
    family = family_of(config)
    model = skeleton(config)
    sizes = {(site.block, site.name): site.size for site in find_sites(model, family)}
    for number, block in enumerate(blocks_of(model, family)):
        found: set[str] = set()
        for path, tensor in block.named_parameters():
            axes = family.axes(path)
            assert len(axes) in (0, tensor.dim()), path
            for length, site in zip(tensor.shape, axes, strict=False):
                if site is not None:
                    assert length == sizes[number, site], (path, site)
                    found.add(site)
        assert found == set(family.gates)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_a_gate_multiplies_where_its_site_is_sliced(name: str, config: PreTrainedConfig) -> None:
    # At the input of the projection, or of the one module around all projections, that read the
    # site; at the output of a projection that writes it, or of a norm that it selects.
    family = family_of(config)
    for site, point in family.gates.items():
        if point.side == "input":
            readers = {p.path for p in family.projections if p.input == site}
            assert readers, site
            assert all(path == point.path or path.startswith(f"{point.path}.") for path in readers)
        else:
            places = {p.path for p in family.projections if p.output == site}
            places |= {norm.path for norm in family.norms if norm.output == site}
            assert point.path in places, site


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"do_layer_norm_before": False}, "`do_layer_norm_before` is false.*OPT-350m"),
        ({"word_embed_proj_dim": 12}, "`word_embed_proj_dim` 12 is not `hidden_size` 24"),
        ({"layer_norm_elementwise_affine": False}, "its norms have no weights"),
    ],
)
def test_members_of_opt_that_cannot_be_pruned(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"This opt model cannot be pruned: .*{message}"):
        family_of(tiny_config("opt", **overrides))


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_a_gemma_that_looks_ahead_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="its tokens attend in both directions"):
        family_of(tiny_config(name, use_bidirectional_attention=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_code_of_narrow_models_cuts_what_the_row_cuts(name: str) -> None:
    family = FAMILIES[name].with_heads()
    block: Any = config_class(narrow_type(name)).auto_classes["AutoModel"].block_class
    assert block.linears == {p.path: (p.input, p.output) for p in family.projections}
    assert {path: site for path, (site, _) in block.norms.items()} == {
        norm.path: norm.output for norm in family.norms
    }


def test_axes_of_llama_by_hand() -> None:
    axes = FAMILIES["llama"].axes
    assert axes("self_attn.k_proj.weight") == (None, "attn_in")
    assert axes("self_attn.k_proj.bias") == (None,)
    assert axes("self_attn.o_proj.weight") == ("attn_out", None)
    assert axes("self_attn.o_proj.bias") == ("attn_out",)
    assert axes("mlp.up_proj.weight") == ("mlp_mid", "mlp_in")
    assert axes("mlp.down_proj.weight") == ("mlp_out", "mlp_mid")
    assert axes("post_attention_layernorm.weight") == ("mlp_in",)
    assert axes("self_attn.rotary_emb.inv_freq") == ()


def test_axes_of_phi_and_gemma_by_hand() -> None:
    # Two selections of one norm leave the norm whole; a norm behind a projection shrinks with it.
    assert FAMILIES["phi"].axes("input_layernorm.weight") == ()
    assert FAMILIES["phi"].axes("mlp.fc1.bias") == ("mlp_mid",)
    assert FAMILIES["gemma2"].axes("post_attention_layernorm.weight") == ("attn_out",)
    assert FAMILIES["gemma3_text"].axes("self_attn.q_norm.weight") == ()
    assert FAMILIES["opt"].axes("final_layer_norm.bias") == ("mlp_in",)
