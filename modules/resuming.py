"""Refuse what a checkpoint lacks before a step is taken with it.

That a checkpoint is as it was written, its seal tells. Here is what another program or another
version of a library may have written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_CURE = "Resume from another checkpoint, or start again without `--ckpt_path`."


def refuse_unlike(found: Any, expected: Any, where: str) -> None:
    """Refuse a value that lacks something, or has it in another type.

    Args:
        found: Of a checkpoint.
        expected: The same of a run that has just begun; what more there is in `found` may stay.
        where: What it is called, for the message.

    Raises:
        ValueError: Something is missing or of another type.
    """
    if type(found) is not type(expected):
        kind = type(found).__name__
        raise ValueError(f"The checkpoint has {kind} for {where}, which is damaged. {_CURE}")
    if isinstance(expected, Mapping):
        for key, value in expected.items():
            if key not in found:
                raise ValueError(f"The checkpoint lacks {key} of {where}. {_CURE}")
            refuse_unlike(found[key], value, f"{key} of {where}")


def refuse_placeless(loops: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that does not tell how far the data were read: they would start anew.

    Args:
        loops: The state of all loops.

    Raises:
        ValueError: There is no such number.
    """
    states = loops["fit_loop"]["state_dict"].get("combined_loader")
    first = states[0] if isinstance(states, list) and states else None
    if not isinstance(first, Mapping) or type(first.get("samples")) is not int:
        raise ValueError(f"The checkpoint does not tell the place in the data. {_CURE}")


def refuse_incomplete(optimizer: Any) -> None:
    """Refuse the state of an optimiser that was read, where it is no state of its parameters.

    Args:
        optimizer: One that this process holds whole; another one, of a library that divides it, is
            left to that library.

    Raises:
        ValueError: A setting is missing, or an average is no tensor of the shape of its parameter.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    name, averages = type(optimizer).__name__, _averages(optimizer)
    for group in optimizer.param_groups:
        if lost := sorted(optimizer.defaults.keys() - group.keys()):
            raise ValueError(f"The checkpoint lacks {lost[0]} of {name}. {_CURE}")
        for setting, default in optimizer.defaults.items():
            if isinstance(default, float) and not isinstance(group[setting], float | int):
                raise ValueError(
                    f"The checkpoint has {group[setting]!r} for {setting} of {name}. {_CURE}"
                )
        for parameter in group["params"]:
            state: Any = optimizer.state.get(parameter, {})
            for key in averages if state else ():
                value = state.get(key) if isinstance(state, Mapping) else None
                whole = isinstance(value, torch.Tensor) and (
                    value.numel() == 1 or value.shape == parameter.shape
                )
                if not whole:
                    raise ValueError(
                        f"The checkpoint has no {key} of {name} for a parameter of shape "
                        f"{tuple(parameter.shape)}. {_CURE}"
                    )


def _averages(optimizer: torch.optim.Optimizer) -> list[str]:
    """What an optimiser keeps as tensors, per parameter."""
    states = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
    return sorted({key for s in states for key, v in s.items() if isinstance(v, torch.Tensor)})
