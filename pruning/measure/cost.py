"""What this process has cost so far: time and memory."""

from __future__ import annotations

import resource
import sys
import time

import torch

from secateur.pruning.progress import duration

_BEGUN = time.monotonic()  # the program is loaded
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


def process_cost() -> str:
    """Time since this module was loaded, processor time and peak memory, in words."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    parts = [
        f"{duration(time.monotonic() - _BEGUN)} of time",
        f"{duration(used.ru_utime + used.ru_stime)} of processor time",
        f"{used.ru_maxrss * _MAXRSS_UNIT / 1e9:.2f} GB of memory at its peak",
    ]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU")
    return ", ".join(parts)
