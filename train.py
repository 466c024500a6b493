"""Secateur's command line: `python train.py fit|validate|test|predict --config FILE`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modules.command_line import TrainCLI

DEFAULTS = {
    "default_root_dir": "runs/default",
    "max_epochs": -1,
    "check_val_every_n_epoch": None,  # validation is timed in steps, whatever an epoch is
    "use_distributed_sampler": False,  # TextData deals windows out to ranks itself
    "enable_model_summary": False,
}


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


def main(args: list[str] | None = None) -> TrainCLI:
    """Parse the command line (or a list of arguments) and run it."""
    quieten()
    # Here, because these imports are not quiet; callbacks are there for configs to name them.
    from lightning.pytorch import LightningDataModule, LightningModule

    import callbacks  # noqa: F401
    from modules.command_line import TrainCLI

    return TrainCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_defaults=DEFAULTS,
        auto_configure_optimizers=False,  # modules have an optimizer of their own
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


if __name__ == "__main__":
    if "fit" in sys.argv:
        # Asked to stop while libraries and models load: that waits for SaveCheckpoint, which
        # unblocks. SIGTERM does so where `srun` sends it; elsewhere a person has thought again.
        early = {signal.SIGUSR1} | ({signal.SIGTERM} if "SLURM_STEP_ID" in os.environ else set())
        signal.pthread_sigmask(signal.SIG_BLOCK, early)
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("SECATEUR_DEBUG"):
            raise
        notes = [str(error), *getattr(error, "__notes__", ()), "SECATEUR_DEBUG=1 shows where."]
        raise SystemExit("\n".join(["", "error: " + notes[0], *notes[1:]])) from error
