"""What a checkpoint lacks is told before a step is taken with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from secateur.modules.resuming import refuse_incomplete, refuse_placeless, refuse_unlike


def optimizer() -> torch.optim.AdamW:
    """One that has taken a step with two parameters."""
    parameters = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
    made = torch.optim.AdamW(parameters, lr=0.1)
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    made.step()
    return made


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no decay": (lambda state: state["param_groups"][0].pop("weight_decay"), "lacks weight_decay"),
    "decay as text": (
        lambda state: state["param_groups"][0].update(weight_decay="abc"),
        "has 'abc' for weight_decay of AdamW",
    ),
    "betas as a mapping": (
        lambda state: state["param_groups"][0].update(betas={"a": 1}),
        "has {'a': 1} for betas of AdamW",
    ),
    "other betas": (
        lambda state: state["param_groups"][0].update(betas=[1, 2]),
        r"has \[1, 2\] for betas of AdamW",
    ),
    "a rate as a switch": (
        lambda state: state["param_groups"][0].update(lr=True),
        "has True for lr of AdamW",
    ),
    "a switch as text": (
        lambda state: state["param_groups"][0].update(amsgrad="abc"),
        "has 'abc' for amsgrad of AdamW",
    ),
    "no average": (lambda state: state["state"][1].pop("exp_avg"), r"no exp_avg .* shape \(4,\)"),
    "a list": (lambda state: state["state"][0].update(exp_avg_sq=[1, 2]), "no exp_avg_sq"),
    "no state": (lambda state: state["state"].update({0: []}), r"has \[\] as the state of AdamW"),
    "another shape": (
        lambda state: state["state"][0].update(exp_avg=torch.ones(2, 2)),
        r"no exp_avg of AdamW for a parameter of shape \(3, 2\)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_an_incomplete_optimiser_is_refused(
    damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    made = optimizer()
    refuse_incomplete(made)
    state = made.state_dict()
    state = {"param_groups": [dict(g) for g in state["param_groups"]],
             "state": {key: dict(value) for key, value in state["state"].items()}}  # fmt: skip
    damage(state)
    made.load_state_dict(state)
    with pytest.raises(ValueError, match=message):
        refuse_incomplete(made)


def test_a_checkpoint_of_an_optimiser_without_steps_is_complete() -> None:
    refuse_incomplete(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": {}}, "lacks b of a of loops"),
        ({"a": {"b": "1"}}, "has str for b of a of loops"),
        ({"a": [1]}, "has list for a of loops"),
        ([], "has list for loops"),
    ],
)
def test_a_value_of_another_structure_is_refused(found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_unlike(found, {"a": {"b": 0}}, "loops")


def test_a_value_may_hold_more() -> None:
    refuse_unlike({"a": {"b": 3, "c": "x"}}, {"a": {"b": 0}}, "loops")


@pytest.mark.parametrize("states", [None, [], {}, ["a"], [{}], [{"samples": "4"}]])
def test_a_checkpoint_without_data_position_is_refused(states: Any) -> None:
    loops = {"fit_loop": {"state_dict": {"combined_loader": [{"samples": 4}]}}}
    refuse_placeless(loops)
    loops["fit_loop"]["state_dict"]["combined_loader"] = states
    with pytest.raises(ValueError, match="does not tell the place in the data"):
        refuse_placeless(loops)
