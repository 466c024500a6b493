from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from secateur.pruning.commands import (
    JSON,
    PAGE,
    CommandParser,
    new_file,
    read_text,
    typed_command,
    without_secrets,
)

TOKEN = "hf_" + "aB3" * 12
SECRETS = {
    "--trainer.logger.token=abc": "--trainer.logger.token=***",
    "--trainer.logger.init_args.api_key=abc": "--trainer.logger.init_args.api_key=***",
    "--hub-token=abc": "--hub-token=***",
    "HF_TOKEN=abc": "HF_TOKEN=***",
    "WANDB_API_KEY=abc": "WANDB_API_KEY=***",
    f"--model.base={TOKEN}": "--model.base=***",
    "--data.train=s3://me:abc@host/a.json": "--data.train=s3://***@host/a.json",
    "--data.train=https://abc@host/a": "--data.train=https://***@host/a",
    "{class_path: WandbLogger, init_args: {api_key: abc, project: p}}": (
        "{class_path: WandbLogger, init_args: {api_key: ***, project: p}}"
    ),
    '{"password": "abc"}': '{"password": "***"}',
    "--x=ghp_0123456789abcdefABCD": "--x=***",
}
PLAIN = (
    "--data.window_tokens=16",
    "--model.loss_chunk_tokens=512",
    "--data.tokenizer=path/to/tokenizer",
    "--model.base=models/hf_checkpoints/llama",
    "--data.train=https://host/a@b.json",
    "--trainer.max_steps=8",
    "--model.learning={start: null}",
    "sk-learn",
)


@pytest.mark.parametrize(("typed", "shown"), SECRETS.items(), ids=SECRETS)
def test_secrets_are_not_shown(typed: str, shown: str) -> None:
    assert without_secrets(["train.py", typed]) == ["train.py", shown]


def test_a_secret_may_follow_its_name() -> None:
    typed = ["--trainer.logger.api_key", "abc", "--token", "def", "--data.window_tokens", "16"]
    shown = ["--trainer.logger.api_key", "***", "--token", "***", "--data.window_tokens", "16"]
    assert without_secrets(typed) == shown


@pytest.mark.parametrize("typed", PLAIN)
def test_what_is_no_secret_is_shown(typed: str) -> None:
    assert without_secrets([typed]) == [typed]


@pytest.mark.parametrize(
    ("program", "shown"),
    [("/somewhere/secateur/__main__.py", "-m secateur"), ("train.py", "train.py")],
)
def test_a_command_is_shown_as_it_is_typed(program: str, shown: str) -> None:
    found = typed_command([program, "fit", "--model.base", "my model", "--token=abc"])
    assert found == f"python {shown} fit --model.base 'my model' '--token=***'"


def test_errors_name_settings_as_they_are_typed() -> None:
    parser = CommandParser("test", "")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--window-tokens", type=int)
    found = "`window_tokens` and `--windows`, for `OUT` and `dtype`, or `OUT`"
    with (
        pytest.raises(ValueError, match=found.replace("`window_tokens`", "`--window-tokens`")),
        parser.naming(num_windows="--windows", folder="OUT"),
    ):
        raise ValueError("`window_tokens` and `num_windows`, for `out` and `dtype`, or `folder`")


def test_text_is_a_file_or_the_files_of_a_folder(tmp_path: Path) -> None:
    for name, text in (("b.txt", "two"), ("a.txt", "one"), ("c.json", "{}")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_text(tmp_path / "c.json") == "{}"
    assert read_text(tmp_path) == "one\n\ntwo"
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="`--text` .*none holds no files"):
        read_text(tmp_path / "none")
    with pytest.raises(ValueError, match="`--text` .*missing cannot be read"):
        read_text(tmp_path / "missing")


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    page.write_bytes(PAGE[0] + b"<html>")
    assert new_file(PAGE)(str(page)) == page  # that of a former call
    for before in (None, b"", b'{"a": 1}'):
        if before is not None:
            out.write_bytes(before)
        assert new_file(JSON)(str(out)) == out
    for path in (page, out):
        with pytest.raises(ArgumentTypeError, match="may not be of this command"):
            new_file((b"GGUF",))(str(path))
    (tmp_path / "config.json").write_bytes(b"{}")  # of a model, then
    for path in (out, tmp_path / "config.json"):
        with pytest.raises(ArgumentTypeError, match="name another or remove it"):
            new_file(JSON)(str(path))
    with pytest.raises(ArgumentTypeError, match="is a folder"):
        new_file(JSON)(str(tmp_path))
    with pytest.raises(ArgumentTypeError, match="there is no folder"):
        new_file(JSON)(str(tmp_path / "none" / "out"))
