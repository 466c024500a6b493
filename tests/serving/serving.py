"""Every family and kind of plan in the real vLLM and llama.cpp, compared with transformers.

`make test-serving` makes their environment and runs this file; its name keeps it out of
`make test`, which needs neither. Prompts are of four lengths in one batch, one of them longer than
a chunk of vLLM's prefill, with prefix caching on. Greedy tokens are compared up to the first one
that rounding may decide, which differs between processors.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.pruning.export.gguf_file import write_gguf
from secateur.pruning.export.serve_check import serve_check
from secateur.pruning.export.servers import LlamaCpp, ServerError, Transformers, running
from tests.serving.folders import BUILT_IN, FAMILIES, PLANS, POSITIONS, built_in, make_folders

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SECATEUR_SERVING", ROOT / ".venv-serving" / "bin" / "python"))
PROMPTS = [[1], [1, 5, 6], [1, 7, 8, 9, 200, 33, 12], [1, *range(10, 70)]]
NEW_TOKENS, CHUNK = 24, 32


def rows(names: Iterable[str]) -> list[Any]:
    """Parameters of a test; models of most families are slow, and the gate leaves them out."""
    quick = ("llama", "gemma2", "opt")
    return [
        name if name.split(", ")[0] in quick else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]


EVERY = rows(f"{family}, {kind}" for family in FAMILIES for kind in PLANS)


def vllm_error(name: str) -> str | None:
    """Part of the message with which vLLM stops at a model; None if it is supported."""
    family, kind = name.split(", ")
    if kind == "no attention in block 2":
        return "does not dispatch through the Transformers attention interface"
    if kind == "heads per block" or (
        kind == "half of the heads" and family in ("qwen2", "opt", "phi")
    ):
        return "is invalid for input of size"  # it has one number of heads, from config.json
    return None


def refusal(name: str) -> str | None:
    """Part of the message with which the GGUF export refuses a model; None if it is supported."""
    family, kind = name.split(", ")
    if family in ("opt", "phi"):
        return "does not write" if kind != "widths per block" else "cannot select entries"
    if kind == "widths per block":
        return "cannot select entries"
    if family in ("llama", "mistral", "qwen2") or kind in ("dense", "uniform", "half of the heads"):
        return None
    if kind == "depth":
        return "one in every 6" if family == "gemma3_text" else None
    return "has widths per block for Llama, Mistral and Qwen2"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def vllm(
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> dict[str, Any]:
    """What vLLM says to all prompts, by model, for the models of all selected tests."""
    tests: list[Any] = [item for item in request.session.items if "vllm" in item.fixturenames]
    names = {test.callspec.params["name"] for test in tests}
    names |= {*map(built_in, names)}
    asked = {name: folder for name, folder in folders.items() if name in names}
    return ask_vllm(asked, tmp_path_factory.mktemp("vllm"))


def ask_vllm(folders: dict[str, Path], place: Path, eager: bool = True) -> dict[str, Any]:
    job = {"folders": {name: str(path) for name, path in folders.items()}, "eager": eager}
    sizes = {"new_tokens": NEW_TOKENS, "positions": POSITIONS, "chunk": CHUNK}
    (place / "job.json").write_text(json.dumps(job | sizes | {"prompts": PROMPTS}))
    program = Path(__file__).with_name("answer_vllm.py")
    with (place / "log").open("w") as log:
        subprocess.run(
            [PYTHON, program, place / "job.json", place / "out.json"],
            stdout=log,
            stderr=log,
            check=True,
        )
    answers: dict[str, Any] = json.loads((place / "out.json").read_text())
    return answers


@dataclass(frozen=True)
class Answer:
    """What transformers computes for a prompt: greedy tokens, with no end of the text, how far
    each is ahead of the second best, and the log-probabilities of the first.
    """

    tokens: list[int]
    leads: list[float]
    first_V: torch.Tensor

    def clear(self, lead: float) -> int:
        """Number of tokens before the first one that leads by less than `lead` nats."""
        return next((i for i, own in enumerate(self.leads) if own < lead), len(self.leads))


@cache
def expected(folder: Path, half_gelu: bool = False) -> list[Answer]:
    """The answers of transformers to all prompts.

    The GELU of llama.cpp is a table from float16 to float16.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    if half_gelu:
        for module in model.modules():
            if type(module).__name__.startswith("GELU"):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().float(),))
                module.register_forward_hook(lambda _, inputs, output: output.half().float())
    return [greedy(model, prompt) for prompt in PROMPTS]


@torch.inference_mode()
def greedy(model: Any, prompt: list[int]) -> Answer:
    tokens: list[int] = []
    leads, logprobs_NV = [], []
    for _ in range(NEW_TOKENS):
        logprobs_NV.append(model(torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1))
        best, second = logprobs_NV[-1].topk(2).values.tolist()
        leads.append(best - second)
        tokens.append(int(logprobs_NV[-1].argmax()))
    return Answer(tokens, leads, logprobs_NV[0])


@pytest.mark.parametrize("name", EVERY)
def test_vllm(name: str, folders: dict[str, Path], vllm: dict[str, Any]) -> None:
    said = vllm[name]
    if (error := vllm_error(name)) is not None:
        assert error in said["error"]
    else:
        assert_equal(said, folders[name])


@pytest.mark.parametrize("name", rows(BUILT_IN))
def test_what_vllm_has_built_in(name: str, folders: dict[str, Path], vllm: dict[str, Any]) -> None:
    assert_equal(vllm[built_in(name)], folders[name])


def assert_equal(said: dict[str, Any], folder: Path) -> None:
    """Greedy tokens are equal to those of transformers, and first log-probabilities nearly."""
    assert "error" not in said, said
    known = expected(folder)
    for answer, ours, logprobs in zip(known, said["tokens"], said["logprobs"], strict=True):
        clear = answer.clear(1e-4)
        assert ours[:clear] == answer.tokens[:clear]
        for token, value in logprobs.items():
            assert value == pytest.approx(float(answer.first_V[int(token)]), abs=1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_llama_cpp(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    if (reason := refusal(name)) is not None:
        with pytest.raises(ValueError, match=reason):
            write_gguf(folders[name], tmp_path / "model.gguf")
        return
    gemma = name.startswith("gemma")
    known = expected(folders[name], half_gelu=gemma)
    tolerance = 1e-2 if gemma else 1e-3  # what is nearly between two float16 falls either way
    server = LlamaCpp()
    with running(server, PYTHON, folders[name], "float32", tmp_path) as url:
        for prompt, ours in zip(PROMPTS, known, strict=True):
            answer = server.ask(url, prompt, "", NEW_TOKENS)
            assert answer.logprobs is not None
            for token, value in answer.logprobs.items():
                assert value == pytest.approx(float(ours.first_V[token]), abs=tolerance)
            if 2 not in ours.tokens:  # llama.cpp is told never to end a text
                clear = ours.clear(tolerance if gemma else 1e-4)
                assert answer.tokens[:clear] == ours.tokens[:clear]


def test_q8_0_has_its_size(folders: dict[str, Path], tmp_path: Path) -> None:
    sizes = {}
    for kind in ("f32", "q8_0"):
        write_gguf(folders["llama, dense"], tmp_path / kind, kind)
        sizes[kind] = (tmp_path / kind).stat().st_size
    assert sizes["q8_0"] < sizes["f32"] / 2  # rows of 37 stay float16, and so do not shrink as far


def test_both_serve_one_folder_over_http(folders: dict[str, Path]) -> None:
    found = {one.server: one for one in serve_check(folders["llama, MLP widths"], PYTHON)}
    for server in ("vLLM", "vLLM, nemotron-nas", "llama.cpp"):
        one = found[server]
        assert not one.message
        assert one.equal is not None
        assert one.equal[0] == one.equal[1] > 0
        assert one.difference is not None
        assert one.difference < 1e-3
    assert "has no attribute SecateurLlamaForCausalLM" in found["transformers serve"].message


def test_the_server_of_transformers_serves_stock_models(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    server = Transformers()
    with running(server, PYTHON, folders["llama, uniform"], "float32", tmp_path) as url:
        assert server.ask(url, [], "The gardener", 8).text


def test_a_server_that_dies_says_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with (
        pytest.raises(ServerError, match="transformers serve ended with code 1: .*Error"),
        running(Transformers(), PYTHON, tmp_path / "model", "float32", tmp_path),
    ):
        pass
