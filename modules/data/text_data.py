"""Text as windows of tokens: read, tokenised once, split, shuffled, resumed exactly."""

from __future__ import annotations

from pathlib import Path

from secateur.modules.data.token_data import TokenData
from secateur.modules.data.tokens import tokenise


class TextData(TokenData):
    """Text as batches of token windows: `input_ids`, int64 of shape (batch_size, window_tokens).

    Documents are encoded with the tokenizer's defaults (BOS in front for Llama and Gemma; if a
    tokenizer adds neither BOS nor EOS, an EOS follows every document), concatenated in order and
    cut into windows. Only the last partial window of a split is dropped. The tokens are cached on
    disk and memory-mapped: later runs and all ranks start at once.

    The order of training is a pure function of `seed`, the same on any number of ranks, and a
    resumed run sees exactly the batches that an uninterrupted one would have seen. Every batch is
    full: windows that do not fill one are the first of the next epoch. Use with
    `use_distributed_sampler=False`, because this class divides the data among ranks.

    Args:
        train: Text to train on: files, folders of files, or data sets of the hub, one or a list.
            Files: .txt (one document), .json (a list of strings or objects), .jsonl, .parquet.
            Folders: all files below except hidden ones, or the output of datasets' `save_to_disk`.
            Hub: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; every row is a document.
        validation: Text to validate on, in the same forms. If not given, documents of `train` are
            held out.
        tokenizer: Folder or hub id of the tokenizer; the command line sets the base model's.
        window_tokens: Tokens of a window, 2 or more, at most the positions of the model.
        batch_size: Windows of a batch on one rank, 1 or more.
        text_field: Field of objects, and column of tables, that holds the text.
        held_out: Fraction of the documents of `train` that is held out if `validation` is not
            given, in (0, 1): every 20th document for 0.05. With too few documents, the last windows
            are held out instead.
        validation_windows: Number of validation windows to use, the first ones, 1 or more; all if
            not given.
        seed: Seed of the training order, 0 or more.
        cache_dir: Folder of the tokenised texts; ~/.cache/secateur/tokens if not given.
        num_workers: Processes that read ahead, 0 or more; 0 is enough, since data is memory-mapped.
        trust_remote_code: Whether Python files that the tokenizer brings may run; as the model says
            where the tokenizer is that of its base.
        weights: Mixture of the entries of `train`: one weight above 0 each, with any sum. Windows
            are drawn in these proportions, and small entries repeated. If not given, every window
            comes once per epoch.
        max_tokens: Length of training in tokens, 1 or more, rounded up to whole steps, instead of
            `trainer.max_steps`.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        tokenizer: str | None = None,
        window_tokens: int = 2048,
        batch_size: int = 1,
        text_field: str = "text",
        held_out: float = 0.05,
        validation_windows: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        num_workers: int = 0,
        trust_remote_code: bool = False,
        weights: list[float] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(
            train=train,
            validation=validation,
            weights=weights,
            tokenizer=tokenizer,
            window_tokens=window_tokens,
            batch_size=batch_size,
            text_field=text_field,
            held_out=held_out,
            validation_windows=validation_windows,
            max_tokens=max_tokens,
            seed=seed,
            cache_dir=cache_dir,
            num_workers=num_workers,
            trust_remote_code=trust_remote_code,
        )
        self._field = text_field

    @property
    def form(self) -> str:
        return self._field

    @property
    def tokens_per_window(self) -> float:
        return self.window_tokens

    def write(self, setting: str, held_out: float | None, entry: Path) -> None:
        tokenise(self._sources[setting], self.tokenizer, held_out, entry)
