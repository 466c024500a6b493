"""Drop messages of libraries that do not help a user of the program, or are wrong here."""

from __future__ import annotations

import logging
import os
import warnings


class _Without(logging.Filter):
    """A filter that passes every message that does not contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in str(record.msg)


def quieten() -> None:
    """Drop messages of libraries that do not help a user of this program, or are wrong here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for logger, text in (
        ("DeepSpeed", "Setting accelerator to CPU"),
        ("bitsandbytes.backends.cpu.ops", "gemm_4bit_forward"),
        ("lightning.pytorch.utilities.rank_zero", "Tip: For seamless cloud"),
        # SaveCheckpoint handles this.
        ("lightning.pytorch.trainer.connectors.signal_connector", "SLURM auto-requeueing"),
    ):
        logging.getLogger(logger).addFilter(_Without(text))
    # TextData reads a memory map: workers would only slow it down.
    warnings.filterwarnings("ignore", ".*does not have many workers")
    # Lightning itself uses functions that torch has deprecated.
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
