from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from tokenizers import processors
from transformers import AutoTokenizer

from secateur.modules.data.loader import WindowLoader, Windows, WindowSampler
from secateur.modules.data.text_data import TextData
from secateur.modules.data.token_data import check_vocabulary, check_window
from tests.tiny import SENTENCES, tiny_llama_config, tiny_tokenizer

BOS, EOS = 1, 2
pytestmark = [
    # Lightning advises workers; a memory map needs none.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    # Lightning calls what newer releases of torch deprecate.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def make(tmp_path: Path, tokenizer: str) -> Callable[..., TextData]:
    def text_data(train: Any, **settings: Any) -> TextData:
        settings = {
            "tokenizer": tokenizer,
            "window_tokens": 8,
            "batch_size": 2,
            "cache_dir": str(tmp_path / "cache"),
        } | settings
        return TextData(str(train), **settings)

    return text_data


def documents(count: int, seed: int = 0) -> list[str]:
    words = " ".join(SENTENCES).split()
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(count)]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path


def all_tokens(windows: Windows) -> list[int]:
    return windows.__getitems__(range(len(windows))).flatten().tolist()


# What becomes of the text


def test_every_document_is_encoded_joined_and_cut_without_loss(
    tmp_path: Path, make: Callable[..., TextData]
) -> None:
    texts = documents(60)
    data = make(write(tmp_path / "a.json", texts), held_out=0.1)
    data.setup()
    encode = tiny_tokenizer()
    kept = [id for i, text in enumerate(texts) if i % 10 != 9 for id in encode(text)["input_ids"]]
    aside = [id for text in texts[9::10] for id in encode(text)["input_ids"]]
    assert kept[0] == BOS
    assert all_tokens(data.train_windows) == kept[: len(kept) // 8 * 8]
    assert all_tokens(data.validation_set) == aside[: len(aside) // 8 * 8]


def test_eos_closes_documents_where_the_tokenizer_marks_nothing(
    tmp_path: Path, make: Callable[..., TextData]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save_pretrained(tmp_path / "bare")
    texts = documents(30)
    path = write(tmp_path / "a.json", texts)
    data = make(path, tokenizer=str(tmp_path / "bare"), validation=str(path))
    data.setup()
    tokens = [id for text in texts for id in [*tokenizer(text)["input_ids"], EOS]]
    assert BOS not in tokens
    assert all_tokens(data.train_windows) == tokens[: len(tokens) // 8 * 8]


def test_all_forms_of_files_hold_the_same_text(
    tmp_path: Path, make: Callable[..., TextData], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = documents(20)
    records = [{"body": text, "id": i} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / "deep" / f"{i:02}.txt").write_text(text)
    (folder / "README.md").write_text("not a text to train on")
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(records)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = []
    for train in ("a.jsonl", "b.json", "c.parquet", "folder"):
        data = make(tmp_path / train, text_field="body", held_out=0.2)
        data.setup()
        found.append((all_tokens(data.train_windows), all_tokens(data.validation_set)))
    hub = make("someone/texts:english:test", text_field="body", held_out=0.2)
    hub.setup()
    found.append((all_tokens(hub.train_windows), all_tokens(hub.validation_set)))
    assert all(tokens == found[0] for tokens in found)
    assert asked[0] == (("someone/texts", "english"), {"split": "test"})


def test_a_list_of_files_is_one_text_in_order(
    tmp_path: Path, make: Callable[..., TextData], tokenizer: str
) -> None:
    texts = documents(40)
    paths = [str(write(tmp_path / f"{i}.json", texts[i::2])) for i in (1, 0)]
    data = TextData(paths, paths[0], tokenizer, 8, cache_dir=str(tmp_path / "cache"))
    data.setup()
    tokens = [id for t in texts[1::2] + texts[::2] for id in tiny_tokenizer()(t)["input_ids"]]
    assert all_tokens(data.train_windows) == tokens[: len(tokens) // 8 * 8]


def test_one_long_document_gives_its_last_windows_to_validation(
    tmp_path: Path, make: Callable[..., TextData]
) -> None:
    (tmp_path / "a.txt").write_text(" ".join(documents(40)))
    data = make(tmp_path / "a.txt", held_out=0.2)
    data.setup()
    tokens = tiny_tokenizer()((tmp_path / "a.txt").read_text())["input_ids"]
    total = len(tokens) // 8
    assert len(data.validation_set) == round(0.2 * total)
    together = all_tokens(data.train_windows) + all_tokens(data.validation_set)
    assert together == tokens[: total * 8]
    batch = next(iter(data.val_dataloader()))
    start = len(data.train_windows) * 8
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].flatten().tolist() == tokens[start : start + 16]


def test_tokens_are_made_once_and_anew_when_anything_changes(
    tmp_path: Path, make: Callable[..., TextData], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.json", documents(40))
    first = make(path)
    first.setup()
    entries = set((tmp_path / "cache").iterdir())
    assert len(entries) == 1
    assert not any(entry.name.startswith(".") for entry in entries)

    moved = tmp_path / "elsewhere" / "b.json"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(
            "secateur.modules.data.tokens._encoded", lambda *_: pytest.fail("tokenised twice")
        )
        again = make(moved)
        again.setup()
    assert again.fingerprint == first.fingerprint
    assert all_tokens(again.train_windows) == all_tokens(first.train_windows)

    larger = tiny_tokenizer()
    larger.add_tokens(["secateurs"])
    larger.save_pretrained(tmp_path / "larger")
    write(tmp_path / "c.json", documents(41))
    others = [
        make(tmp_path / "c.json"),
        make(path, tokenizer=str(tmp_path / "larger")),
        make(path, held_out=0.3),
        make(path, window_tokens=9),
        make(path, seed=1),
    ]
    for other in others:
        other.setup()
    prints = {data.fingerprint for data in [first, *others]}
    assert len(prints) == 6
    assert len(set((tmp_path / "cache").iterdir())) == 4  # windows and order are cut from the cache


def test_a_failure_leaves_no_incomplete_file(tmp_path: Path, make: Callable[..., TextData]) -> None:
    good = [json.dumps(text) for text in documents(400)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good, "{broken"]))
    with pytest.raises(ValueError, match="line 401 is not JSON"):
        make(tmp_path / "a.jsonl").setup()
    assert list((tmp_path / "cache").iterdir()) == []


def test_validation_is_capped_and_split_evenly_over_ranks(
    tmp_path: Path, make: Callable[..., TextData], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(write(tmp_path / "a.json", documents(60)), held_out=0.5, validation_windows=11)
    data.setup()
    whole = torch.cat([b["input_ids"] for b in data.val_dataloader()])
    assert len(whole) == 11
    monkeypatch.setattr(TextData, "_num_ranks", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(TextData, "_rank", rank)
        shares.append(torch.cat([b["input_ids"] for b in data.val_dataloader()]))
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), whole[:10])


# The order of training


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    """13 windows of 2 tokens, window i holds 2i and 2i + 1."""
    np.save(tmp_path / "tokens.npy", np.arange(27, dtype=np.uint16))
    return Windows(tmp_path / "tokens.npy", 2, 0, 13)


def loader(windows: Windows, num_workers: int = 0, **sampler: Any) -> WindowLoader:
    order = WindowSampler(len(windows), **{"batch_size": 4, "seed": 0} | sampler)
    return WindowLoader(windows, order, num_workers)


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    return (batch["input_ids"][:, 0] // 2).tolist()


def test_batches_are_full_and_each_permutation_holds_every_window_once(windows: Windows) -> None:
    own = loader(windows)
    epochs = [[numbers(batch) for batch in own] for _ in range(13)]
    assert [len(epoch) for epoch in epochs] == [3] * 13
    stream = [i for epoch in epochs for batch in epoch for i in batch]
    permutations = [stream[start : start + 13] for start in range(0, 156, 13)]
    assert len(permutations) == 12
    assert all(sorted(permutation) == list(range(13)) for permutation in permutations)
    assert len(set(map(tuple, permutations))) == 12
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    assert permutations[0] == order.tolist()


def test_an_iteration_is_a_whole_number_of_steps(windows: Windows) -> None:
    own, other = loader(windows, batches_per_step=2), loader(windows)
    stream = [i for _ in range(6) for batch in own for i in numbers(batch)]
    assert len(own) == 2  # of the three that the windows fill
    assert stream == [i for _ in range(4) for batch in other for i in numbers(batch)]
    with pytest.raises(ValueError, match=r"`batch_size` 4 .* in 4 batches needs 16 windows"):
        loader(windows, batches_per_step=4)


def test_neighbouring_seeds_share_no_permutation() -> None:
    def permutations(seed: int) -> list[tuple[int, ...]]:
        sampler = WindowSampler(50, 50, seed)
        return [tuple(next(iter(sampler))) for _ in range(20)]

    assert len({p for seed in range(5) for p in permutations(seed)}) == 100


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_one_order_and_resume_at_another_number(windows: Windows, ranks: int) -> None:
    alone = loader(windows)
    expected = [i for _ in range(4) for batch in alone for i in numbers(batch)]
    iterators = [
        iter(loader(windows, batch_size=4 // ranks, rank=rank, num_ranks=ranks))
        for rank in range(ranks)
    ]
    first = [i for _ in range(2) for it in iterators for i in numbers(next(it))]
    assert first == expected[:8]

    split = loader(windows, batch_size=4 // ranks, rank=1, num_ranks=ranks)
    it = iter(split)
    next(it), next(it)
    assert split.state_dict() == {"samples": 8}
    wider = [loader(windows, batch_size=2, rank=rank, num_ranks=3) for rank in range(3)]
    for own in wider:
        own.load_state_dict(split.state_dict())
    iterators = [iter(own) for own in wider]
    rest = [i for _ in range(2) for it in iterators for i in numbers(next(it))]
    assert rest == expected[8:20]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_cut_short_loses_nothing(windows: Windows, workers: int) -> None:
    whole = loader(windows)
    expected = [numbers(batch) for _ in range(2) for batch in whole]
    own = loader(windows, workers)
    seen = []
    for _ in range(3):
        iterator = iter(own)
        seen += [numbers(next(iterator)) for _ in range(2)]  # workers have read further
    assert seen == expected
    other = loader(windows, 2 - workers)
    other.load_state_dict(own.state_dict())
    assert numbers(next(iter(other))) == numbers(next(iter(own)))


class Recorder(LightningModule):
    """Trains one number and writes down the batches that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].flatten().tolist())
        return self.weight

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Validation must not move the position of training."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveOften(Callback):
    """Saves wherever the checkpoints of Lightning do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"batch-{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"validation-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.global_step}.ckpt")


def fit(
    data: TextData, folder: Path, max_steps: int, resume: Path | None = None
) -> tuple[Recorder, Trainer]:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=SaveOften(folder),
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return module, trainer


@pytest.mark.parametrize(("workers", "resumed_workers"), [(0, 0), (2, 2), (2, 0)])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(
    tmp_path: Path, make: Callable[..., TextData], workers: int, resumed_workers: int
) -> None:
    path = write(tmp_path / "a.json", documents(5))

    def data(num_workers: int) -> TextData:
        return make(path, validation=str(path), batch_size=5, num_workers=num_workers)

    whole, trainer = fit(data(workers), tmp_path / "whole", 20)
    per_epoch = trainer.num_training_batches
    assert len(whole.seen) == 20
    assert 2 * per_epoch + 2 < 20
    assert len(trainer.datamodule.train_windows) % 5 != 0  # epochs hand windows on to the next
    # In the middle of an epoch, at its end, just after it, and in later ones.
    steps = (1, per_epoch, per_epoch + 1, 2 * per_epoch, 2 * per_epoch + 2)
    places = [f"batch-{step}" for step in steps]
    places += [f"{place}-{per_epoch}" for place in ("validation", "epoch")]
    for place in places:
        checkpoint = tmp_path / "whole" / f"{place}.ckpt"
        resumed, _ = fit(data(resumed_workers), tmp_path / "on", 20, checkpoint)
        assert resumed.seen == whole.seen[int(place.split("-")[1]) :], place


def test_resuming_on_other_data_is_refused(tmp_path: Path, make: Callable[..., TextData]) -> None:
    path = write(tmp_path / "a.json", documents(20))
    fit(make(path), tmp_path / "run", 2)
    checkpoint = tmp_path / "run" / "batch-1.ckpt"
    with pytest.raises(ValueError, match="another configuration of TextData: `fingerprint`"):
        fit(make(path, seed=1), tmp_path / "on", 3, checkpoint)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's use of jsonargparse
def test_lightning_cli_makes_it(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    paths = [str(write(tmp_path / f"{i}.json", documents(9, i))) for i in (0, 1)]
    args = [f"--data.train={json.dumps(paths)}", f"--data.tokenizer={tokenizer}"]
    common = {"run": False, "seed_everything_default": 0, "save_config_callback": None}
    several = LightningCLI(Recorder, TextData, args=[*args, "--data.seed=3"], **common)
    assert several.datamodule.train == paths
    assert several.datamodule.seed == 3
    single = LightningCLI(Recorder, TextData, args=[f"--data.train={paths[0]}"], **common)
    assert single.datamodule.train == paths[0]


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00\x01binary", "`train`: .*a.txt: the file is not UTF-8 text"),
        ("a.txt", b"abc\nde\0f", "a.txt: line 2 holds a zero character and is not text"),
        ("a.json", b'["a", "b\\u0000"]', "a.json: entry 1 holds a zero character"),
        ("a.json", b'["a", "\\ud83d b"]', r"entry 1 holds half of a character, '.ud83d'"),
        ("a.jsonl", b'"a"\n\n"\\ude00"', r"line 3 holds half of a character, '.ude00'"),
        ("a.json", b"[" * 100_000, "the file is not JSON"),
        ("a.jsonl", b'{"messages": []}', "line 1 has no 'text'; it has 'messages': chats"),
        ("a.txt", b"", "`train` holds no text"),
        ("a.json", b"[]", "`train` holds no text"),
        ("a.json", b"{", "the file is not JSON"),
        ("a.json", b'{\n"text": "a"}', "must hold a list"),
        ("a.json", b'{"text": "a"}\n{"txt": "b"}', "line 2 has no 'text'; .* one of 'txt'"),
        ("a.json", b"[1]", "entry 0 holds int, not text"),
        ("a.jsonl", b'{"body": "a", "id": 1}', "line 1 has no 'text'; set `text_field` to one of "
         "'body', 'id'"),
        ("a.parquet", b"PAR1 no", "not a parquet file"),
        ("a.txt", b"short", "less than one window of `window_tokens` 8"),
        ("a.pdf", b"%PDF", "has an unknown suffix; give .json, .jsonl, .parquet, .txt"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(
    tmp_path: Path, make: Callable[..., TextData], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make(tmp_path / name, validation=str(tmp_path / name)).setup()


def test_a_parquet_column_that_is_missing_is_named(
    tmp_path: Path, make: Callable[..., TextData]
) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'text'; set `text_field` to one of 'body'"):
        make(tmp_path / "a.parquet").setup()
    with pytest.raises(ValueError, match="holds int, not text"):
        make(tmp_path / "a.parquet", text_field="id").setup()
    many = pa.table({"text": ["a"] * 70_000 + ["b\0"]})
    pq.write_table(many, tmp_path / "b.parquet", row_group_size=1000)
    with pytest.raises(ValueError, match="b.parquet: row 70000 holds a zero character"):
        make(tmp_path / "b.parquet").setup()
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:40] = bytes(36)
    (tmp_path / "c.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="c.parquet: not a parquet file, or damaged"):
        make(tmp_path / "c.parquet", text_field="body").setup()


def test_json_lines_are_read_whatever_the_suffix(
    tmp_path: Path, make: Callable[..., TextData]
) -> None:
    lines = "\n".join(json.dumps({"text": text, "id": 1}) for text in documents(40))
    found = []
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(lines)
        data = make(tmp_path / name)
        data.setup()
        found.append(all_tokens(data.train_windows))
    assert found[0] == found[1]


def test_a_link_that_leads_nowhere_is_not_passed_over(
    tmp_path: Path, make: Callable[..., TextData]
) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "a.json", documents(4))
    (tmp_path / "folder" / "b.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"`train`: .*b.json is a link that leads nowhere; mend"):
        make(tmp_path / "folder").setup()


def test_a_folder_logs_its_text_files_and_skips_others(
    tmp_path: Path, make: Callable[..., TextData], caplog: pytest.LogCaptureFixture
) -> None:
    folder, texts = tmp_path / "folder", documents(40)
    (folder / ".git").mkdir(parents=True)
    (folder / "b").mkdir()
    write(folder / "a.json", texts[:20])
    write(folder / "b" / "c.json", texts[20:])
    write(folder / ".git" / "d.json", ["not this"] * 50)
    write(folder / ".hidden.json", ["nor this"] * 50)
    (folder / "b" / "config.json").write_text('{\n  "model_type": "llama"\n}')
    (folder / "LICENSE").write_text("nor that")
    write(tmp_path / "same.json", texts)
    expected, data = make(tmp_path / "same.json"), make(folder)
    expected.setup()
    with caplog.at_level("INFO"):
        data.setup()
    assert all_tokens(data.train_windows) == all_tokens(expected.train_windows)
    assert f"train: 2 files of {folder}: a.json, b/c.json; not " in caplog.text
    assert "b/config.json" in caplog.text


def test_a_data_set_on_disk_is_read(
    tmp_path: Path, make: Callable[..., TextData], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = documents(40)
    rows = datasets.Dataset.from_dict({"text": texts})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "other")
    expected = make(write(tmp_path / "same.json", texts))
    expected.setup()
    for name in ("rows", "splits", "splits/test"):
        data = make(tmp_path / name)
        data.setup()
        assert all_tokens(data.train_windows) == all_tokens(expected.train_windows)
    with pytest.raises(ValueError, match="other has no split `train`; give one of .*other/test"):
        make(tmp_path / "other").setup()
    with pytest.raises(ValueError, match="rows has no column 'body'; .* one of 'text'"):
        make(tmp_path / "rows", text_field="body").setup()
    next((tmp_path / "rows").glob("*.arrow")).write_bytes(b"no")
    with pytest.raises(ValueError, match="rows is a data set on disk that cannot be read"):
        make(tmp_path / "rows").setup()


def test_a_damaged_cache_is_reported_with_what_to_delete(
    tmp_path: Path, make: Callable[..., TextData]
) -> None:
    path = write(tmp_path / "a.json", documents(40))
    make(path).setup()
    (entry,) = (tmp_path / "cache").iterdir()
    for name in ("train.npy", "held_out.npy", "checksums.json"):
        whole = (entry / name).read_bytes()
        content = bytearray(whole)
        content[-5] ^= 1
        for damaged in (bytes(content), whole[:-3], b"{}", None):
            (entry / name).unlink()
            if damaged is not None:
                (entry / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"is damaged. Delete {entry}"):
                make(path).setup()
        (entry / name).write_bytes(whole)
    make(path).setup()


def test_tokenizer_settings_change_the_cache_key(
    tmp_path: Path, make: Callable[..., TextData], tokenizer: str
) -> None:
    path = write(tmp_path / "a.json", [f"{text}</s>" for text in documents(40)])
    settings = json.loads(Path(tokenizer, "tokenizer_config.json").read_text())
    shutil.copytree(tokenizer, tmp_path / "moved")
    shutil.copytree(tokenizer, tmp_path / "split")
    (tmp_path / "split" / "tokenizer_config.json").write_text(
        json.dumps(settings | {"split_special_tokens": True})
    )
    first, moved, split = (
        make(path, tokenizer=str(tmp_path / name)) for name in ("tokenizer", "moved", "split")
    )
    for data in (first, moved, split):
        data.setup()
    assert moved.fingerprint == first.fingerprint
    assert split.fingerprint != first.fingerprint
    assert len(split.train_windows) > len(first.train_windows)


def test_missing_files_and_hub_data_are_reported(
    tmp_path: Path, make: Callable[..., TextData], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        raise datasets.exceptions.DatasetNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for train, message in (
        (tmp_path / "none.json", "there is no file .*none.json"),
        ("none.txt", "there is no file none.txt"),
        (tmp_path / "empty", "holds no file of"),
        ("someone/nothing", "neither a local file or folder nor a data set .* no such data set"),
    ):
        with pytest.raises(ValueError, match=message):
            make(train).setup()
    with pytest.raises(ValueError, match="`validation`: there is no file"):
        make(write(tmp_path / "a.json", documents(9)), validation="none.txt").setup()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("held_out", 0.0),
        ("held_out", 1.0),
        ("window_tokens", 1),
        ("batch_size", 0),
        ("validation_windows", 0),
        ("seed", -1),
        ("num_workers", -1),
    ],
)
def test_settings_out_of_range_are_named(
    make: Callable[..., TextData], setting: str, value: float
) -> None:
    with pytest.raises(ValueError, match=f"`{setting}` must be .*, got {value}"):
        make("a.txt", **{setting: value})


def test_an_invalid_tokenizer_is_reported(tmp_path: Path, make: Callable[..., TextData]) -> None:
    path = write(tmp_path / "a.json", documents(9))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"`tokenizer` .*nothing' is not the folder or hub id"):
        make(path, tokenizer=str(tmp_path / "nothing")).setup()
    with pytest.raises(ValueError, match="`tokenizer` must be set"):
        make(path, tokenizer=None).setup()


def test_too_little_text_for_a_batch_or_a_split_is_refused(
    tmp_path: Path, make: Callable[..., TextData]
) -> None:
    (tmp_path / "a.txt").write_text(SENTENCES[0])
    data = make(tmp_path / "a.txt", batch_size=100)
    data.setup()
    with pytest.raises(ValueError, match="`batch_size` 100 on 1 ranks needs 100 windows"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"too few to hold out 0\.9 of them"):
        make(tmp_path / "a.txt", held_out=0.9).setup()


def test_window_and_vocabulary_are_checked_against_the_model(
    tmp_path: Path, make: Callable[..., TextData]
) -> None:
    config = tiny_llama_config(max_position_embeddings=32)
    check_window(32, config)
    with pytest.raises(ValueError, match="`window_tokens` 33 is longer than the 32 positions"):
        check_window(33, config)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = tiny_llama_config(vocab_size=len(tokenizer) - 1)
    texts = documents(20)
    for number, place in ((0, None), (1, 0), (2, 19)):  # the last one is held out
        more = [f"{text} <image>" if at == place else text for at, text in enumerate(texts)]
        path = write(tmp_path / f"{number}.json", more)
        data = make(path, tokenizer=str(tmp_path / "tokenizer"), held_out=0.1)
        data.setup()
        if place is None:
            check_vocabulary(data, config)  # no text has it
            continue
        with pytest.raises(ValueError, match=rf"the id {config.vocab_size} \('<image>'\), and"):
            check_vocabulary(data, config)


def test_real_text_gives_the_windows_of_the_reference(data: Path, tmp_path: Path) -> None:
    text = TextData(
        str(data / "text/c4_masktrain.json"),
        str(data / "text/tinystories_val.txt"),
        str(data / "models/llama7m"),
        window_tokens=256,
        cache_dir=str(tmp_path),
    )
    text.setup()
    assert len(text.train_windows) == 2580
    reference = torch.from_numpy(np.load(data / "reference/calib_128x256.npy"))
    assert torch.equal(text.train_windows.__getitems__(range(128)), reference.long())
    assert len(text.validation_set) == 850
    assert AutoTokenizer.from_pretrained(data / "models/llama7m").bos_token_id == BOS
