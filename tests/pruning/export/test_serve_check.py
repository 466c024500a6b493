"""The comparison, with a server that is made here. The real ones are tried in tests/serving."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from secateur.pruning.export import serve_check as module
from secateur.pruning.export.serve_check import main, serve_check
from secateur.pruning.export.servers import Answer, Server, last_lines, post
from tests.tiny import tiny_folder

_PROGRAM = """
import http.server, json, sys, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
wrong = len(sys.argv) > 3


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.say({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = torch.tensor([body["ids"]])
        with torch.inference_mode():
            first = model(ids).logits[0, -1].log_softmax(-1)
            tokens = model.generate(
                ids, do_sample=False, max_new_tokens=body["new"], min_new_tokens=body["new"]
            )[0, ids.shape[1] :].tolist()
        if wrong:
            tokens[-1] += 1
        self.say({"tokens": tokens, "logprobs": first.tolist()})

    def say(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


class Ours(Server):
    name, packages, install = "ours", ("json",), "nothing"

    def __init__(self, *extra: str) -> None:
        self.extra = extra

    def command(self, folder: Path, dtype: str, port: int, scratch: Path) -> list[str]:
        return ["-c", _PROGRAM, str(folder), str(port), *self.extra]

    def ask(self, url: str, prompt: list[int], text: str, new_tokens: int) -> Answer:
        said = post(url, "/", {"ids": prompt, "new": new_tokens})
        return Answer(said["tokens"], "", dict(enumerate(said["logprobs"])))


class Dies(Ours):
    name = "dies"

    def command(self, folder: Path, dtype: str, port: int, scratch: Path) -> list[str]:
        return ["-c", "print('loading'); raise OSError('no memory')"]


class Formless(Ours):
    name = "formless"

    def command(self, folder: Path, dtype: str, port: int, scratch: Path) -> list[str]:
        raise ValueError("no form for it")


def test_servers_are_compared_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SERVERS", (Ours(), Dies(), Formless()))
    base = tiny_folder(tmp_path / "base", max_position_embeddings=128)
    main([str(base), "--at-once", "2", "--json", str(tmp_path / "found.json")])
    ours, dies, formless = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert ours["equal"] == [72, 72]  # three of the prompts fit
    assert ours["difference"] < 1e-5
    assert ours["tokens_per_s"]["2"] > 0
    assert dies["message"] == "dies ended with code 1: OSError: no memory"
    assert formless["message"] == "no form for it"
    said = capsys.readouterr().out
    assert "dies: dies ended with code 1" in said


def test_a_server_that_answers_differently_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SERVERS", (Ours("wrong"),))
    base = tiny_folder(tmp_path / "base", max_position_embeddings=128)
    with pytest.raises(SystemExit) as end:
        main([str(base), "--at-once", "1", "--json", str(tmp_path / "found.json")])
    assert end.value.code == 1
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))[0]["equal"] == [69, 72]
    assert "differ" in capsys.readouterr().out


def test_without_a_server_the_packages_are_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    base = tiny_folder(tmp_path / "base")
    with pytest.raises(ValueError, match="`python` /no/such is not a program"):
        serve_check(base, "/no/such")
    with pytest.raises(ValueError, match=r"has none of the servers.*xllamacpp"):
        main([str(base), "--python", str(python)])
    with pytest.raises(ValueError, match="`dtype` must be one of float32, bfloat16, float16, got"):
        serve_check(base, dtype="int8")


def test_the_error_of_a_server_process_is_reported(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(
        "loading\nAttributeError: no class\nTraceback\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_lines(tmp_path / "log", 1) == "AttributeError: no class"
