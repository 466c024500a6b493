"""vLLM on many model folders, two at a time; runs in .venv-serving, where pytest is not.

usage: answer_vllm.py JOB OUT. JOB is JSON: `folders` (name to path), `prompts` (token ids),
`new_tokens`, `eager`, `positions`, `chunk`. OUT gets, by name, `tokens` and `logprobs` of every
prompt, or `error`.
Every model has a process of its own, forked when vLLM and what the models before it needed are
imported, which takes longest.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # models are tiny
}

AT_ONCE = 2
JOB: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
if JOB["eager"]:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the sampler is compiled otherwise

from vllm import LLM, SamplingParams  # noqa: E402 (it reads the environment now)


def answer(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """What a model says to all prompts in one batch."""
    config = json.loads((Path(folder) / "config.json").read_text())
    narrow = config["model_type"].startswith("secateur_")
    try:
        llm = LLM(
            folder,
            model_impl="transformers" if narrow else "auto",
            trust_remote_code="auto_map" in config,
            dtype="float32",
            enforce_eager=job["eager"],
            max_model_len=job["positions"],
            max_num_batched_tokens=job["chunk"],
            max_num_seqs=8,
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
        )
        wanted = SamplingParams(
            temperature=0,
            max_tokens=job["new_tokens"],
            ignore_eos=True,
            logprobs=20,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        llm.generate(prompts[:1], wanted, use_tqdm=False)  # its blocks are in the cache then
        said = [request.outputs[0] for request in llm.generate(prompts, wanted, use_tqdm=False)]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    firsts = [{token: p.logprob for token, p in one.logprobs[0].items()} for one in said]
    return {"tokens": [list(one.token_ids) for one in said], "logprobs": firsts}


def start(folder: str, partial: Path) -> int:
    """Ask a model in a process of its own, which writes what it said; gives its number."""
    partial.write_text(json.dumps({"error": "the process died"}))
    gc.freeze()  # vLLM collects garbage many times, and all that is imported is none
    if (child := os.fork()) == 0:
        said = answer(folder, JOB) | {"modules": [*sys.modules]}
        partial.write_text(json.dumps(said))
        sys.stdout.flush()
        os._exit(0)
    return child


def main() -> None:
    out = Path(sys.argv[2])
    answers: dict[str, dict[str, Any]] = {}
    at_work: dict[int, tuple[str, Path]] = {}

    def finish() -> None:
        child, _ = os.wait()
        name, partial = at_work.pop(child)
        answers[name] = json.loads(partial.read_text())
        modules = answers[name].pop("modules", [])
        out.write_text(json.dumps(answers))
        for module in modules:
            if module.startswith(("vllm.", "transformers.")):  # once here, for all later ones
                with suppress(ImportError):
                    importlib.import_module(module)

    for number, (name, folder) in enumerate(JOB["folders"].items()):
        if len(at_work) == AT_ONCE:
            finish()
        partial = out.with_name(f"{number}.json")
        at_work[start(folder, partial)] = name, partial
    while at_work:
        finish()


main()
