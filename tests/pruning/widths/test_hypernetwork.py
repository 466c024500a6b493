from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from secateur.pruning.widths.hypernetwork import (
    FreeLogits,
    GRUHypernetwork,
    Hypernetwork,
    NoRecurrence,
    SharedHeads,
)

SIZES = (6, 6, 6, 11, 6, 6, 6, 6, 9, 6)  # two blocks with uneven MLP widths


@pytest.fixture(params=[GRUHypernetwork, SharedHeads, NoRecurrence, FreeLogits])
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
    for kind in (GRUHypernetwork, SharedHeads, NoRecurrence):
        torch.manual_seed(1)
        first = kind(SIZES, seed=3)()
        torch.manual_seed(2)
        assert torch.equal(first, kind(SIZES, seed=3)())
        assert not torch.equal(first, kind(SIZES, seed=4)())


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    for kind in (GRUHypernetwork, SharedHeads, NoRecurrence):
        kind(SIZES)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", [GRUHypernetwork, SharedHeads, NoRecurrence])
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


def test_few_features_begin_as_small_and_step_as_far_as_all() -> None:
    sizes, spread, moved = (400, 400), [], []
    for stride in (1, 11):
        network = GRUHypernetwork(sizes, head_stride=stride)
        optimizer = torch.optim.AdamW(network.heads.parameters(), lr=1e-3, weight_decay=0.0)
        before = network()
        before.sum().backward()
        optimizer.step()
        spread.append(float(before.detach().std()))
        moved.append(float((network() - before).detach().abs().mean()))
    heads = [w.shape[-1] for w in network.heads.parameters()]
    assert heads == [12]
    assert 0.6 < spread[1] / spread[0] < 1.6
    assert 0.6 < moved[1] / moved[0] < 1.6
    with pytest.raises(ValueError, match="`head_stride` must be in 1 to 128, got 129"):
        GRUHypernetwork(sizes, head_stride=129)


def test_shared_heads_are_one_head_per_size_and_a_number_per_gate() -> None:
    network = SharedHeads(SIZES, input_size=5, hidden_size=3, step_scale=7.0)
    with torch.no_grad():
        network.own.logits.copy_(torch.arange(sum(SIZES)))
    features_SH = network.norm(network.gru(network.input)[0].squeeze(1))
    features_SH = torch.nn.functional.gelu(features_SH)
    heads = [network.heads[str(size)] @ f for size, f in zip(SIZES, features_SH, strict=True)]
    torch.testing.assert_close(network(), torch.cat(heads) + 7 * network.own.logits)


def reached(network: Hypernetwork, steps: int = 60) -> float:
    """Fraction of gates on the right side after learning an arbitrary mask."""
    wanted_N = (
        torch.randint(0, 2, (sum(SIZES),), generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.softplus(-wanted_N * network()).sum().backward()
        optimizer.step()
    return float((network().sign() == wanted_N).float().mean())


def test_every_mask_can_be_reached() -> None:
    # With one feature per site, a shared head gives all sites of a size the same mask or its
    # opposite; the numbers of the gates do the rest.
    few = {"input_size": 1, "hidden_size": 1}
    assert reached(SharedHeads(SIZES, **few)) == 1
    coupled = SharedHeads(SIZES, **few)
    coupled.own.requires_grad_(False)
    assert reached(coupled) < 0.95
    assert reached(GRUHypernetwork(SIZES)) == 1
    assert reached(FreeLogits(SIZES)) == 1


def test_a_step_moves_a_number_as_far_as_a_head_of_the_usual_width() -> None:
    # At a learning rate of 1e-3 a logit without the factor moves by 1e-3 a step, and the offset of
    # the sampler, 3, would be crossed after 3000 steps.
    moved = {}
    for network in (FreeLogits(SIZES), FreeLogits(SIZES, step_scale=50.0), NoRecurrence(SIZES)):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
        before = network().detach()
        network().sum().backward()
        optimizer.step()
        moved[repr(network)] = float((before - network()).detach().median())
    free, scaled, head = moved.values()
    assert free == pytest.approx(1e-3, rel=0.01)
    assert scaled == pytest.approx(0.05, rel=0.01)
    assert head == pytest.approx(scaled, rel=0.2)
    assert len(moved) == 3  # told apart where runs are compared


@pytest.mark.parametrize("kind", [FreeLogits, SharedHeads])
def test_a_step_scale_of_nothing_is_refused(kind: type[FreeLogits] | type[SharedHeads]) -> None:
    with pytest.raises(ValueError, match="`step_scale` must be above 0, got 0"):
        kind(SIZES, step_scale=0.0)


def _count(
    blocks: int,
    width: int,
    mlp_width: int,
    kind: Callable[[Sequence[int]], Hypernetwork] = GRUHypernetwork,
) -> int:
    sizes = [width, width, width, mlp_width, width] * blocks
    with torch.device("meta"):
        network = kind(sizes)
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
    shared = 128 * (width + mlp_width) + blocks * (4 * width + mlp_width) + gru + norm
    assert _count(blocks, width, mlp_width, SharedHeads) == shared
    assert shared < 0.03 * (heads + gru + norm)


def test_free_logits_are_handed_out_as_a_copy() -> None:
    network = FreeLogits(SIZES)
    with torch.no_grad():
        network().add_(1)
    assert torch.equal(network.logits, torch.zeros(sum(SIZES)))
