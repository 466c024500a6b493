from __future__ import annotations

import pytest
import torch

from pruning.hypernetwork import FreeLogits, GRUHypernetwork, Hypernetwork, NoRecurrence

SIZES = (6, 6, 6, 11, 6, 6, 6, 6, 9, 6)  # two blocks with uneven MLP widths


@pytest.fixture(params=[GRUHypernetwork, NoRecurrence, FreeLogits])
def network(request: pytest.FixtureRequest) -> Hypernetwork:
    network: Hypernetwork = request.param(SIZES)
    return network


def test_one_logit_per_gate_and_a_gradient_for_every_parameter(network: Hypernetwork) -> None:
    logits = network()
    assert logits.shape == (sum(SIZES),)
    weights = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_same_seed_same_logits() -> None:
    for kind in (GRUHypernetwork, NoRecurrence):
        torch.manual_seed(1)
        first = kind(SIZES, seed=3)()
        torch.manual_seed(2)
        assert torch.equal(first, kind(SIZES, seed=3)())
        assert not torch.equal(first, kind(SIZES, seed=4)())


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    GRUHypernetwork(SIZES)
    NoRecurrence(SIZES)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", [GRUHypernetwork, NoRecurrence])
def test_the_input_is_saved_but_never_trained(kind: type[Hypernetwork]) -> None:
    network = kind(SIZES)
    before = network.get_buffer("input").clone()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5)
    first = network().detach()
    network().square().sum().backward()
    optimizer.step()
    assert not torch.equal(first, network())
    assert torch.equal(before, network.get_buffer("input"))
    assert "input" in network.state_dict()
    assert "input" not in dict(network.named_parameters())


def test_heads_of_equal_size_are_each_their_own() -> None:
    # The batched product per size must equal one plain product per site, in the order of the sites.
    network = GRUHypernetwork(SIZES, input_size=5, hidden_size=3)
    features_SH = network.norm(network.gru(network.input)[0].squeeze(1))
    features_SH = torch.nn.functional.gelu(features_SH)
    seen: dict[int, int] = {}
    expected = []
    for site, size in enumerate(SIZES):
        nth = seen.setdefault(size, 0)
        seen[size] += 1
        expected.append(network.heads.weights[str(size)][nth] @ features_SH[site])
    torch.testing.assert_close(network(), torch.cat(expected))


def _count(blocks: int, width: int, mlp_width: int) -> int:
    sizes = [width, width, width, mlp_width, width] * blocks
    with torch.device("meta"):
        network = GRUHypernetwork(sizes)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("shape", "millions"),
    [((32, 4096, 11008), 112.2), ((40, 5120, 13824), 175.6), ((80, 8192, 28672), 629)],
)
def test_published_sizes(shape: tuple[int, int, int], millions: float) -> None:
    blocks, width, mlp_width = shape
    heads = 128 * blocks * (4 * width + mlp_width)
    # Per direction 3 gates of 64 x (32 inputs + 64 states) and two biases; then the LayerNorm.
    gru, norm = 2 * 3 * 64 * (32 + 64 + 2), 2 * 128
    assert _count(blocks, width, mlp_width) == heads + gru + norm
    assert _count(blocks, width, mlp_width) / 1e6 == pytest.approx(millions, abs=0.2)


def test_free_logits_are_handed_out_as_a_copy() -> None:
    network = FreeLogits(SIZES)
    with torch.no_grad():
        network().add_(1)
    assert torch.equal(network.logits, torch.zeros(sum(SIZES)))
