"""Finished blocks on disk, to resume a killed run from and to write the model from.

One file per block, `block-00003.safetensors`: the new weights and the packed masks of its matrices.
A file appears when it is complete. `run.json` identifies their run: model, recipe, windows and all
other settings that affect the result. `prune_weights` writes it; blocks of another run are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.pruning.blocks.linears import weight_of
from secateur.pruning.checksums import tensor_checksum
from secateur.pruning.files.settings import differences
from secateur.pruning.weights.masks import pack, unpack
from secateur.pruning.weights.parts import PrunedBlock

RUN = "run.json"
_MASK = ".mask"
_BLOCK, _PARTIAL = "block-*.safetensors", ".{}.partial"


class BlockStore:
    """The finished blocks of a run.

    Args:
        folder: Their folder; created if needed.
        settings: Settings that affect the run besides those of `prune_weights`; JSON values.

    Raises:
        ValueError: The folder holds the blocks of a run with other settings, or its `run.json` is
            damaged.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings: dict[str, Any] = {}
        """All known settings that affect the run."""
        self._whole: set[int] = set()  # blocks whose checksums were compared
        if self._blocks():
            try:
                self.settings = dict(json.loads((self.folder / RUN).read_text(encoding="utf-8")))
            except (OSError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.folder / RUN} does not identify the run of the blocks beside it: "
                    f"{error}. Delete {self.folder}; the blocks are then pruned again."
                ) from error
        self.claim(settings or {})

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Record the settings of the run of these blocks.

        Args:
            settings: JSON values; they are added to earlier ones.

        Raises:
            ValueError: There are finished blocks already, of a run with other settings.
        """
        if self._blocks():
            saved = {key: self.settings.get(key) for key in settings}
            if found := differences(saved, settings):
                raise ValueError(
                    f"{self.folder} holds the blocks of another run, which may not have ended: "
                    f"{'; '.join(found)}. Resume with its settings, or delete the folder."
                )
        self.settings |= settings
        text = json.dumps(self.settings, indent=1)
        _replace(self.folder / RUN, lambda partial: partial.write_text(text, encoding="utf-8"))

    def _blocks(self) -> list[Path]:
        return sorted(self.folder.glob(_BLOCK))

    def path(self, index: int) -> Path:
        """The file of a block."""
        return self.folder / f"block-{index:05d}.safetensors"

    def save(self, index: int, block: nn.Module, pruned: PrunedBlock) -> None:
        """Save a finished block."""
        tensors = {}
        for path, mask_OI in pruned.masks.items():
            tensors[f"{path}.weight"] = weight_of(block, path).detach().contiguous()
            tensors[f"{path}{_MASK}"] = pack(mask_OI)
        notes = json.dumps(list(pruned.notes))
        metadata = {"notes": notes, "checksum": tensor_checksum(tensors, f"{index} {notes}")}
        self._whole.discard(index)
        _replace(self.path(index), lambda partial: save_file(tensors, partial, metadata=metadata))

    @torch.no_grad()
    def load(self, index: int, block: nn.Module) -> PrunedBlock | None:
        """Load the weights of a finished block into the block; None if it is not finished.

        Raises:
            ValueError: The file of the block is damaged.
        """
        if not self.path(index).is_file():
            return None
        masks = {}
        with self._opened(index) as file:
            for name in sorted(file.keys()):
                if name.endswith(_MASK):
                    path = name.removesuffix(_MASK)
                    weight = weight_of(block, path)
                    weight.copy_(file.get_tensor(f"{path}.weight"))
                    masks[path] = unpack(file.get_tensor(name), (weight.shape[0], weight.shape[1]))
            notes = json.loads(file.metadata()["notes"])
        return PrunedBlock(masks, notes)

    def weight(self, index: int, name: str) -> Tensor:
        """A new weight of a finished block, by the name of its parameter in the block.

        Raises:
            ValueError: The block is not finished, or its file is damaged.
        """
        if not self.path(index).is_file():
            raise ValueError(f"{self.folder} lacks block {index}: the run has not finished.")
        with self._opened(index) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    @contextmanager
    def _opened(self, index: int) -> Iterator[Any]:
        """Open the file of a block; its checksum is verified before the first read.

        Raises:
            ValueError: The file is damaged.
        """
        path = self.path(index)
        try:
            with safe_open(path, framework="pt") as file:
                if index not in self._whole:
                    _check(file, index)
                    self._whole.add(index)
                yield file
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged: {error}. Delete it; the block is then pruned again."
            ) from error


def delete_blocks(folder: Path) -> None:
    """Delete the finished blocks in a folder; other files are kept."""
    for pattern in (_BLOCK, _PARTIAL.format("*"), RUN):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _check(file: Any, index: int) -> None:
    """Compare a file with the checksum that it contains.

    Raises:
        ValueError: They differ.
    """
    told = file.metadata()
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if tensor_checksum(tensors, f"{index} {told['notes']}") != told["checksum"]:
        raise ValueError("its checksum differs")


def _replace(path: Path, write: Any) -> None:
    """Replace a file atomically: even if the run is killed, it is the old or the new one."""
    partial = path.with_name(_PARTIAL.format(path.name))
    try:
        write(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
