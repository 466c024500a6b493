"""Drop messages of libraries that tell a user of the program nothing, or what is not so."""

from __future__ import annotations

import logging
import os
import warnings


class _Without(logging.Filter):
    """Passes every message that does not contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in str(record.msg)


def quieten() -> None:
    """Drop messages of libraries that tell a user of this program nothing, or what is not so."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for logger, text in (
        ("DeepSpeed", "Setting accelerator to CPU"),
        ("bitsandbytes.backends.cpu.ops", "gemm_4bit_forward"),
        ("lightning.pytorch.utilities.rank_zero", "Tip: For seamless cloud"),
        # SaveCheckpoint does that.
        ("lightning.pytorch.trainer.connectors.signal_connector", "SLURM auto-requeueing"),
    ):
        logging.getLogger(logger).addFilter(_Without(text))
    # TextData reads a memory map: workers would only cost.
    warnings.filterwarnings("ignore", ".*does not have many workers")
    # Lightning's own use of what torch has deprecated.
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
