"""End a run in which a rank has died, and report which one."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed

log = logging.getLogger(__name__)
_BEAT = 1.0  # seconds between two heartbeats
_CONNECTION = re.compile("gloo|nccl|connection|peer|timed out", re.IGNORECASE)


class WatchRanks(Callback):
    """Send a heartbeat from every rank each second; end the run if a rank is silent for too long.

    A rank that is killed, or whose machine fails, leaves the others waiting in a collective
    operation, often for half an hour. Here they end within `patience_seconds`, and name the lost
    rank. A rank that fails with an error reports it before it ends. Heartbeats come from a thread:
    long steps, exports and measurements do not delay them.

    Args:
        patience_seconds: Silence after which a rank counts as lost, above 2.

    Raises:
        ValueError: `patience_seconds` is too short to tell silence from a pause.
    """

    def __init__(self, patience_seconds: float = 60.0) -> None:
        if patience_seconds <= 2 * _BEAT:
            raise ValueError(f"`patience_seconds` must be above 2, got {patience_seconds}.")
        self.patience_seconds = patience_seconds
        self._watch: _Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start to watch, once the process group exists, until the process ends."""
        if self._watch is None and trainer.world_size > 1 and distributed.is_initialized():
            shared: Any = distributed.distributed_c10d._get_default_store()
            store = shared.clone()
            store.set_timeout(timedelta(seconds=self.patience_seconds))
            self._watch = _Watch(
                trainer.global_rank, trainer.world_size, self.patience_seconds, store
            )
            self._watch.start()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Report the error of this rank; or wait for the name of the lost rank that caused it."""
        if self._watch is None or not isinstance(exception, Exception):
            return  # asked to stop, as are all ranks
        if _CONNECTION.search(str(exception)):
            self._watch.over.wait(self.patience_seconds + 3 * _BEAT)  # ends here if one is lost
        self._watch.say(str(exception))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report that this rank has finished."""
        if self._watch is not None:
            self._watch.farewell()
            self._watch = None


class _Watch(threading.Thread):
    """Heartbeats in the store of the process group, over a separate connection."""

    def __init__(self, rank: int, num_ranks: int, patience_seconds: float, store: Any) -> None:
        super().__init__(daemon=True, name="WatchRanks")
        self.rank, self.patience = rank, patience_seconds
        self.others = [other for other in range(num_ranks) if other != rank]
        self.store = store
        self.name_of = {rank: f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"}
        self.store.set(f"watch/name/{rank}", self.name_of[rank])
        self.over = threading.Event()

    def run(self) -> None:
        heard = dict.fromkeys(self.others, (b"", time.monotonic()))
        beat = 0
        while not self.over.wait(_BEAT):
            beat += 1
            try:
                self.store.set(f"watch/beat/{self.rank}", str(beat))
                lost = self._listen(heard)
            except (RuntimeError, OSError):  # DistError is a RuntimeError: the store is gone
                lost = "rank 0, which holds the store of the process group"
            if lost and not self.over.is_set():
                log.error(
                    "%s: %s is lost; this rank ends as well. See its own output and the log of its "
                    "machine for the reason. `--ckpt_path last` resumes from the last checkpoint.",
                    self.name_of[self.rank],
                    lost,
                )
                logging.shutdown()
                os._exit(1)  # the main thread may wait in a collective that never ends

    def say(self, words: str) -> None:
        """Publish why this rank ends, and wait until the others can have read it."""
        self._leave("words", words)
        time.sleep(3 * _BEAT)

    def farewell(self) -> None:
        """Publish that this rank has finished; the rank with the store waits for the others."""
        self._leave("farewell", "done")
        until = time.monotonic() + self.patience
        while self.rank == 0 and time.monotonic() < until and not self._all_have_left():
            time.sleep(_BEAT / 20)

    def _leave(self, key: str, value: str) -> None:
        self.over.set()
        try:
            self.store.set(f"watch/{key}/{self.rank}", value)
        except (RuntimeError, OSError) as error:  # rank 0 has ended, and the store with it
            log.info("%s could not publish %s: %s", self.name_of[self.rank], key, error)

    def _all_have_left(self) -> bool:
        return all(self._read(f"watch/farewell/{other}") for other in self.others)

    def _listen(self, heard: dict[int, tuple[bytes, float]]) -> str | None:
        """The name of a rank that has been silent for too long, or has published an error."""
        now = time.monotonic()
        for other in self.others:
            if self._read(f"watch/farewell/{other}"):
                heard[other] = (b"", now)
                continue
            if words := self._read(f"watch/words/{other}"):
                return f"{self._describe(other)}, which ended with {words.decode()!r},"
            beat = self._read(f"watch/beat/{other}") or b""
            if beat != heard[other][0]:
                heard[other] = (beat, now)
            elif now - heard[other][1] > self.patience:
                return f"{self._describe(other)}, silent for {self.patience:.0f} s,"
        return None

    def _read(self, key: str) -> bytes | None:
        value: bytes | None = self.store.get(key) if self.store.check([key]) else None
        return value

    def _describe(self, rank: int) -> str:
        return (self._read(f"watch/name/{rank}") or f"rank {rank}".encode()).decode()
