"""Sources of blocks: a live model, or a checkpoint that is read block by block.

The arguments of blocks are recorded from a real call of the model: every block's forward is
temporarily replaced by a function that records its arguments and returns its input. So every block
gets position embeddings, masks and all other arguments of any release of transformers, and
recording needs no weights of blocks.

Legend: B = windows of a batch, T = tokens of a window, N = windows, D = width of the residual
stream.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.pruning.blocks.linears import BlockCall, PrunableLinear, linears_of
from secateur.pruning.chains import Step, kinds_of, refuse
from secateur.pruning.families import blocks_of, family_of
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.fingerprint import live_fingerprint
from secateur.pruning.measure.perplexity import MeasuredPerplexity, perplexity
from secateur.pruning.modes import evaluation


class BlockSource(ABC):
    """The blocks of a model, one at a time.

    Attributes:
        model: The model: embeddings, final norm and head have their weights; blocks may have none.
        device: Where blocks and calibration states are.
        linears: The prunable layers of every block.
    """

    model: PreTrainedModel
    device: torch.device
    linears: list[list[PrunableLinear]]
    keeps_changes: bool
    """Whether changes to a block persist when `block` is called again."""

    @abstractmethod
    def block(self, index: int) -> nn.Module:
        """A block with its weights, which may be changed."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the model in its present state, weights included."""

    @property
    def prefix(self) -> str:
        """Common prefix of the parameter names of all blocks, such as `model.layers.`."""
        return f"{family_of(self.model.config).blocks}."

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, with or without weights."""
        return blocks_of(self.model, family_of(self.model.config))


class LiveBlocks(BlockSource):
    """The blocks of a loaded model; pruning them changes the model.

    Args:
        model: A causal language model of a known family, not quantised.

    Raises:
        ValueError: The family is unknown or the model is quantised.
    """

    keeps_changes = True

    def __init__(self, model: PreTrainedModel) -> None:
        refuse(kinds_of(model.config), Step.WEIGHTS)
        self.model = model
        self.linears = linears_of(model)
        self.device = next(model.parameters()).device

    def block(self, index: int) -> nn.Module:
        return self.blocks[index]

    def fingerprint(self) -> str:
        return live_fingerprint(self.model)


class StreamedBlocks(BlockSource):
    """The blocks of a model folder, read one at a time on request.

    Memory: one block, the embeddings and the head.

    Args:
        folder: Model folder with config.json and safetensors, in one file or several.
        device: Device of blocks and calibration states.

    Raises:
        ValueError: The folder holds no model, its family is unknown, it is quantised, or
            tensors are missing.
    """

    keeps_changes = False

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        self.base, self.device = BaseModel(Path(folder)), torch.device(device)
        self.base.refuse(Step.WEIGHTS)
        self.model = copy.deepcopy(self.base.skeleton()).eval()
        self.linears = linears_of(self.model)
        self._load_what_is_not_in_blocks()

    def block(self, index: int) -> nn.Module:
        block = copy.deepcopy(self.blocks[index])
        names = {name: f"{self.prefix}{index}.{name}" for name in block.state_dict()}
        block.load_state_dict(self._read(names), assign=True)
        return block.requires_grad_(False)

    def fingerprint(self) -> str:
        return self.base.fingerprint

    def _load_what_is_not_in_blocks(self) -> None:
        model: Any = self.model
        for name, module in model.named_modules():
            buffers = list(module.buffers(recurse=False))
            if not f"{name}.".startswith(self.prefix) and any(b.is_meta for b in buffers):
                for key, buffer in module.named_buffers(recurse=False):
                    setattr(module, key, torch.empty_like(buffer, device=self.device))
                model._init_weights(module)  # buffers not in checkpoints, such as rotary tables
        outside = {name for name in model.state_dict() if not name.startswith(self.prefix)}
        tied = set(model.all_tied_weights_keys)  # files have the tensor under its other name
        names = {name: name for name in outside if name in self.base.tensors or name not in tied}
        model.load_state_dict(self._read(names), assign=True, strict=False)
        model.tie_weights()
        model.requires_grad_(False)

    def _read(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Tensors of the checkpoint, under other names."""
        if missing := [name for name in names.values() if name not in self.base.tensors]:
            raise ValueError(
                f"{self.base.folder} lacks {len(missing)} tensors of a "
                f"{self.model.config.model_type!r} causal language model, {missing[0]!r} first. "
                "Save it as a causal language model."
            )
        tensors = {}
        for ours, theirs in names.items():
            path = self.base.tensors[theirs]
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                tensors[ours] = file.get_tensor(theirs)
        return tensors


class CalibrationStates:
    """Calibration windows as inputs of the next block.

    Memory: 1 x windows x T x D numbers of the model's type, and the arguments of the calls. Equal
    arguments are stored once: the memory of positions, and of masks of B x T x T if a family needs
    them, does not grow with the number of windows.

    Args:
        source: The model.
        windows_NT: Token ids.
        batch_size: Windows per forward pass of a block, 1 or more.

    Raises:
        ValueError: There are no windows, or they are longer than the positions of the model.
    """

    def __init__(
        self, source: BlockSource, windows_NT: Int[Tensor, "N T"], batch_size: int
    ) -> None:
        check_windows(source.model.config, windows_NT, batch_size)
        self.source, self.windows_NT, self.batch_size = source, windows_NT, batch_size
        self.hidden: list[Tensor] = []
        self._arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        shared = _EqualOnce()

        def note(index: int, hidden_BTD: Tensor, args: Any, kwargs: Any) -> Tensor:
            if index == 0:
                shared.next_batch()
                self.hidden.append(hidden_BTD)
                self._arguments.append([])
            self._arguments[-1].append(shared((args, kwargs)))
            return hidden_BTD

        body: Any = source.model.base_model
        with torch.no_grad(), evaluation(source.model), _replaced(source.blocks, note):
            for batch_BT in windows_NT.split(batch_size):
                body(input_ids=batch_BT.to(source.device), use_cache=False)

    def calls(self, index: int) -> Iterator[BlockCall]:
        """The arguments of block `index`, batch by batch; it must be the next block."""
        for hidden_BTD, arguments in zip(self.hidden, self._arguments, strict=True):
            yield BlockCall(hidden_BTD, *arguments[index])

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module) -> None:
        """Run the windows through block `index` in its present state."""
        for batch, call in enumerate(self.calls(index)):
            self.hidden[batch] = call.run(block)

    def perplexity(self) -> MeasuredPerplexity:
        """Perplexity of the windows, from the output of the last block."""
        last = len(self.source.blocks) - 1
        outputs = iter(self.hidden)

        def hand_in(index: int, hidden_BTD: Tensor, args: Any, kwargs: Any) -> Tensor:
            return next(outputs) if index == last else hidden_BTD

        with _replaced(self.source.blocks, hand_in):
            return perplexity(self.source.model, self.windows_NT, self.batch_size)


class _EqualOnce:
    """Replace tensors by equal ones stored earlier."""

    def __init__(self) -> None:
        self._distinct: list[Tensor] = []
        self._of_batch: dict[int, tuple[Tensor, Tensor]] = {}  # all blocks get the same tensors

    def next_batch(self) -> None:
        """Forget the identities of the tensors of a batch; stored tensors are kept."""
        self._of_batch.clear()

    def __call__(self, value: Any) -> Any:
        """The same arguments with stored tensors, nested in any way."""
        if isinstance(value, Tensor):
            if id(value) not in self._of_batch:
                self._of_batch[id(value)] = value, self._kept(value)
            return self._of_batch[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)(map(self, value))
        if type(value) is dict:
            return {key: self(each) for key, each in value.items()}
        return value

    def _kept(self, value: Tensor) -> Tensor:
        for known in self._distinct:
            if known.dtype == value.dtype and torch.equal(known, value):
                return known
        self._distinct.append(value)
        return value


class NoStates:
    """Replaces calibration states if no part reads them."""

    def calls(self, index: int) -> Iterator[BlockCall]:
        """None."""
        return iter(())

    def advance(self, index: int, block: nn.Module) -> None:
        """Nothing moves."""


def check_windows(config: Any, windows_NT: Tensor, batch_size: int) -> None:
    """Refuse windows that a model cannot read, before any work.

    Raises:
        ValueError: They are not a table of token ids, there are none, they are longer than the
            positions of the model, or hold tokens outside its vocabulary.
    """
    if windows_NT.dim() != 2 or windows_NT.is_floating_point():
        raise ValueError(
            "Calibration windows must be token ids, whole numbers of shape (windows, tokens), got "
            f"{windows_NT.dtype} of shape {tuple(windows_NT.shape)}; one window of ids is "
            "`ids[None]`."
        )
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}.")
    if len(windows_NT) == 0:
        raise ValueError("There are no calibration windows; give 1 or more, usually 128.")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and windows_NT.shape[1] > positions:
        raise ValueError(
            f"Calibration windows have {windows_NT.shape[1]} tokens, the model has {positions} "
            "positions (`max_position_embeddings`); cut shorter windows."
        )
    if int(windows_NT.max()) >= config.vocab_size or int(windows_NT.min()) < 0:
        raise ValueError(
            f"Calibration windows hold token {int(windows_NT.max())}, the vocabulary has "
            f"{config.vocab_size}; use the tokenizer of this model."
        )


@contextmanager
def _replaced(
    blocks: Sequence[nn.Module],
    forward: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor],
) -> Iterator[None]:
    """Temporarily make every block compute `forward(index, hidden, args, kwargs)`."""

    def replacement(index: int) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            if args:
                return forward(index, args[0], args[1:], kwargs)
            hidden_BTD = kwargs.pop("hidden_states")
            return forward(index, hidden_BTD, (), kwargs)

        return call

    try:
        for index, block in enumerate(blocks):
            block.forward = replacement(index)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
