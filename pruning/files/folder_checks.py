"""What lies in a folder that is no text model of transformers, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.pruning.files.model_folder import CONFIG, companions, read_json

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx")


def check_folder(folder: Path, shown: str) -> None:
    """Refuse, by its files alone, what cannot be a base model.

    Args:
        folder: What was given; it exists.
        shown: How it was given, for the message.

    Raises:
        ValueError: It is a file, holds an adapter, weights of another format or a link that leads
            out of it, or lacks configuration or weights.
    """
    if folder.is_file():
        raise ValueError(f"{shown} is a file, not a model folder. {_gguf([folder])}".rstrip())
    if found := [name for name in _ADAPTER if (folder / name).exists()]:
        raise ValueError(
            f"{shown} holds an adapter ({found[0]}). Add it to the weights of its base (peft: "
            "`merge_and_unload`, then `save_pretrained`) and give that folder; or, if it is not "
            "meant, move it elsewhere."
        )
    ggufs, safe = sorted(folder.glob("*.gguf")), any(folder.glob("*.safetensors"))
    if ggufs and not safe:
        raise ValueError(f"{shown} holds no *.safetensors file. {_gguf(ggufs)}")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{shown} is not a model folder: it has no {CONFIG}.")
    if not safe:
        other = next((path.name for kind in _OTHER_WEIGHTS for path in folder.glob(kind)), None)
        raise ValueError(
            f"{shown} holds no *.safetensors file{f', only {other}' if other else ''}; save the "
            "model with `save_pretrained` (safe serialisation is its default) first."
        )
    for path in (folder / CONFIG, *companions(folder)):
        if leads_out(path, folder):
            raise ValueError(
                f"{shown} has the link {path.name}, which leads out of it, to {path.resolve()}; "
                "what lies there would be copied. Put the file itself there, or remove the link."
            )


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file, or one below it, is a link to what lies elsewhere.

    The cache of the hub is made of links: a folder `snapshots/REVISION` of links into `blobs`.
    """
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parents[1] / "blobs")
    inside = [path, *path.rglob("*")] if path.is_dir() else [path]
    return not all(any(p.resolve().is_relative_to(at) for at in homes) for p in inside)


def check_settings(settings: Mapping[str, Any], shown: str) -> None:
    """Refuse, by its configuration, what is no text model.

    Raises:
        ValueError: It is made of several models, or of more than text.
    """
    text = settings.get("text_config")
    if isinstance(text, dict):
        kind = str(text.get("model_type", "text model"))
        raise ValueError(
            f"{shown} is a {settings.get('model_type')!r} model of more than text (`text_config` "
            f"in its {CONFIG}). Save its text model, {kind!r}, in a folder of its own: load it by "
            "AutoModelForImageTextToText, and give its `language_model` and `lm_head` to the "
            "AutoModelForCausalLM of `config.text_config`."
        )
    if settings.get("is_encoder_decoder"):
        raise ValueError(
            f"{shown} is an encoder and a decoder (`is_encoder_decoder` in its {CONFIG}); give a "
            "causal language model."
        )


def _gguf(files: Sequence[Path]) -> str:
    """How GGUF files become a model folder; empty if these are none."""
    if not (name := next((path.name for path in files if path.suffix == ".gguf"), "")):
        return ""
    return (
        f"Make a model folder of {name}: AutoModelForCausalLM.from_pretrained(FOLDER, "
        f'gguf_file="{name}").save_pretrained(NEW), and the same with AutoTokenizer.'
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """What config.json says of a model, without what it says of how, and by what code, to run it.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        settings = read_json(folder / CONFIG)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} has no readable {CONFIG}: {error}") from error
    return model_settings(settings)


def model_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration that are of the model.

    The others name code in its folder or kernels on the hub, or change what calls return.
    """
    return {name: value for name, value in settings.items() if name not in _HOW_TO_RUN}


_HOW_TO_RUN = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "return_dict",
    "use_return_dict",
    "output_attentions",
    "output_hidden_states",
    "torchscript",
    "configuration_files",
    "transformers_weights",
)
