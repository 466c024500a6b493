"""Refuse an incomplete checkpoint before the first step.

The seal of a checkpoint shows that it is undamaged. These checks find contents that another program
or another version of a library may have written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_CURE = "Resume from another checkpoint, or start again without `--ckpt_path`."


def refuse_unlike(found: Any, expected: Any, where: str) -> None:
    """Refuse a value with missing entries or entries of another type.

    Args:
        found: Value in a checkpoint.
        expected: The same value in a new run; further entries in `found` are allowed.
        where: Its name, for the message.

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
    """Refuse a checkpoint without the position in the data, which would start from the beginning.

    Args:
        loops: The state of all loops.

    Raises:
        ValueError: The position is missing.
    """
    states = loops["fit_loop"]["state_dict"].get("combined_loader")
    first = states[0] if isinstance(states, list) and states else None
    if not isinstance(first, Mapping) or type(first.get("samples")) is not int:
        raise ValueError(f"The checkpoint does not tell the place in the data. {_CURE}")


def refuse_incomplete(optimizer: Any) -> None:
    """Refuse a loaded optimiser state that does not match its parameters.

    Args:
        optimizer: The optimiser. Only those of torch are checked: others may keep different
            tensors for different parameters, and sharded ones are checked by their library.

    Raises:
        ValueError: A setting is missing, or an average is not a tensor of the shape of its
            parameter.
    """
    if not type(optimizer).__module__.startswith("torch.optim."):
        return
    name, averages = type(optimizer).__name__, _averages(optimizer)
    for group in optimizer.param_groups:
        if lost := sorted(optimizer.defaults.keys() - group.keys()):
            raise ValueError(f"The checkpoint lacks {lost[0]} of {name}. {_CURE}")
        for setting, default in optimizer.defaults.items():
            if not _may_be(group[setting], setting, default):
                raise ValueError(
                    f"The checkpoint has {group[setting]!r} for {setting} of {name}. {_CURE}"
                )
        for parameter in group["params"]:
            state: Any = optimizer.state.get(parameter, {})
            if not isinstance(state, Mapping):
                raise ValueError(
                    f"The checkpoint has {state!r:.40} as the state of {name} for a parameter of "
                    f"shape {tuple(parameter.shape)}. {_CURE}"
                )
            for key in averages if state else ():
                value = state.get(key)
                whole = isinstance(value, torch.Tensor) and (
                    value.numel() == 1 or value.shape == parameter.shape
                )
                if not whole:
                    raise ValueError(
                        f"The checkpoint has no {key} of {name} for a parameter of shape "
                        f"{tuple(parameter.shape)}. {_CURE}"
                    )


def _may_be(value: Any, setting: str, default: Any) -> bool:
    """Whether a group of an optimiser may have a value: rates and decays differ from the default,
    switches may be undecided, and all else is as it was made.
    """
    if default is None or isinstance(default, bool):
        return value is None or isinstance(value, bool)
    if setting in ("lr", "weight_decay"):
        return isinstance(value, float | int | torch.Tensor) and not isinstance(value, bool)
    return bool(value == default)


def _averages(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the tensors that an optimiser keeps per parameter."""
    states = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
    return sorted({key for s in states for key, v in s.items() if isinstance(v, torch.Tensor)})
