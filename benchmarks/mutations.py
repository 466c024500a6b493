"""Random errors in the contents of a folder: each mutation changes one thing.

A folder without checksums can also be changed into another valid one, such as a model with a
different weight. Mutations here are always errors: a file of which every byte is checked may change
anywhere, another one only so that its structure, names or types break.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from secateur.pruning.files.checkpoints import read_seal, seal, write_whole

Mutation = Callable[[Path, random.Random, Callable[[Path], bool]], str | None]
"""A function that changes a folder, from the folder, the random generator, and a test whether every
byte of a file is checked. It returns a description of the change, None if nothing can be changed in
this way.
"""

# Names of models, of code and of leftovers of other programs that may be in any folder.
_EXTRA_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "model-00009-of-00009.safetensors",
    "modeling_planted.py",
    "notes.txt",
    "pytorch_model.bin",
    "step=9999.ckpt",
    "tokenization_planted.py",
    "train.npy.bak",
)
_DECIDES = ("callbacks", "loops", "lr_schedulers", "optimizer_states", "secateur", "state_dict")
"""State from which a checkpoint resumes, besides the position in the data."""
_EXTRA_FIELDS: tuple[tuple[str, Any], ...] = (
    ("attn_implementation", "someone/kernel"),
    (
        "auto_map",
        {"AutoConfig": "modeling_planted.C", "AutoModelForCausalLM": "modeling_planted.M"},
    ),
    ("auto_map", {"AutoModelForCausalLM": "someone/else--modeling_planted.M"}),
    ("nobody_knows_this", [1, 2, 3]),
    ("quantization_config", {"quant_method": "fp8"}),
)
_OF_ANOTHER_TYPE: tuple[Any, ...] = ("abc", [], {}, [1, 2], {"a": 1})
_SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
_WRONG_SIZES = (-1, 0, 1, 5, 10**9)
_METADATA = "__metadata__"
_PLANT = "import pathlib\npathlib.Path({ran!r}).touch()\n"


def mutations(ran: Path) -> dict[str, Mutation]:
    """The kinds of mutations by name.

    Args:
        ran: File that planted code creates when it runs.
    """
    return {
        "flip": flip,
        "truncate": truncate,
        "rename": rename,
        "swap": swap,
        "extra": lambda folder, draw, sealed: extra(folder, draw, ran),
        "missing": missing,
        "lie": lie,
    }


def flip(folder: Path, draw: random.Random, sealed: Callable[[Path], bool]) -> str | None:
    """Turn one bit."""
    files = [path for path in _files(folder) if sealed(path) or path.suffix == ".safetensors"]
    if not files:
        return None
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content) if sealed(path) else _header_end(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"bit of byte {place} of {path.name}"


def truncate(folder: Path, draw: random.Random, sealed: Callable[[Path], bool]) -> str | None:
    """Cut the end off a file."""
    files = [path for path in _files(folder) if sealed(path) or path.suffix != ".txt"]
    path = draw.choice(files)
    content = path.read_bytes().rstrip()  # losing the end of line is harmless
    length = draw.choice([0, draw.randrange(len(content)), len(content) - 1])
    path.write_bytes(content[:length])
    return f"{path.name} ends after {length} of {len(content)} bytes"


def rename(folder: Path, draw: random.Random, sealed: Callable[[Path], bool]) -> str | None:
    """Give a file, a tensor or a field of JSON another name."""
    path = draw.choice(_files(folder))
    if path.suffix == ".safetensors" and draw.random() < 0.7:
        header, data, name = _drawn_tensor(path, draw)
        other = draw.choice([f"module.{name}", name.upper(), name.replace(".", "_"), f"{name}x"])
        header = {other if key == name else key: entry for key, entry in header.items()}
        _write_tensors(path, header, data)
        return f"tensor {name} of {path.name} is {other}"
    if path.suffix == ".json" and draw.random() < 0.7:
        content = _read_json(path)
        owner, key = _place(content, draw, mappings=True)
        if owner is not None and (key in _SIZES or sealed(path)):
            owner[f"{key}_"] = owner.pop(key)
            _write_json(path, content)
            return f"{key} of {path.name} is {key}_"
    path.rename(path.with_name(f"{path.name}.bak"))
    return f"{path.name} is {path.name}.bak"


def swap(folder: Path, draw: random.Random, sealed: Callable[[Path], bool]) -> str | None:
    """Exchange two files, or two tensors of one file."""
    files = _files(folder)
    path = draw.choice(files)
    if path.suffix == ".safetensors" and draw.random() < 0.7:
        header, data = _read_tensors(path)
        one, other = draw.choice(_tensors(header)), draw.choice(_tensors(header))
        differ = header[one]["shape"] != header[other]["shape"]
        if one != other and (sealed(path) or differ):
            header[one], header[other] = header[other], header[one]
            _write_tensors(path, header, data)
            return f"tensors {one} and {other} of {path.name} are exchanged"
    second = draw.choice([other for other in files if other != path] or [path])
    one_content, other_content = path.read_bytes(), second.read_bytes()
    if one_content == other_content:
        return None
    path.write_bytes(other_content)
    second.write_bytes(one_content)
    return f"{path.name} and {second.name} are exchanged"


def extra(folder: Path, draw: random.Random, ran: Path) -> str | None:
    """Add a file, code that runs when it is read, or a field of JSON."""
    folders = sorted({path.parent for path in _files(folder)})
    configs = [path for path in _files(folder) if path.name == "config.json"]
    plant = _PLANT.format(ran=str(ran))
    if configs and draw.random() < 0.5:
        path, (name, value) = draw.choice(configs), draw.choice(_EXTRA_FIELDS)
        _write_json(path, _read_json(path) | {name: value})
        (path.parent / "modeling_planted.py").write_text(plant)
        return f"{path.name} has {name}"
    path = draw.choice(folders) / draw.choice(_EXTRA_FILES)
    if path.suffix == ".py":
        path.write_text(plant)
    elif path.suffix in (".bin", ".ckpt"):
        # A pickle, which calls what it names.
        path.write_bytes(b"cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    elif path.name == "adapter_config.json":
        path.write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}))
    elif path.suffix == ".safetensors":
        sources = [file for file in _files(folder) if file.suffix == ".safetensors"]
        path.write_bytes(draw.choice(sources).read_bytes() if sources else b"")
    else:
        path.write_text("nothing")
    return f"{path.name} is there, too"


def missing(folder: Path, draw: random.Random, sealed: Callable[[Path], bool]) -> str | None:
    """Remove a file, a tensor or a field of JSON."""
    path = draw.choice(_files(folder))
    if path.suffix == ".safetensors" and draw.random() < 0.7:
        header, data, name = _drawn_tensor(path, draw)
        start, end = header.pop(name)["data_offsets"]
        for key, entry in header.items():  # the file is intact, but lacks the tensor
            if key != _METADATA and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [place - end + start for place in entry["data_offsets"]]
        _write_tensors(path, header, data[:start] + data[end:])
        return f"{path.name} lacks {name}"
    if path.suffix == ".ckpt" and draw.random() < 0.7:
        return _change_checkpoint(path, draw, remove=True)
    if path.suffix == ".json" and draw.random() < 0.7:
        content = _read_json(path)
        owner, key = _place(content, draw, mappings=True)
        if owner is not None and (key in _SIZES or sealed(path)):
            del owner[key]
            _write_json(path, content)
            return f"{path.name} lacks {key}"
    path.unlink()
    return f"{path.name} is missing"


def lie(folder: Path, draw: random.Random, sealed: Callable[[Path], bool]) -> str | None:
    """Change the description of a tensor, or the value of a JSON field, to a wrong one."""
    files = [p for p in _files(folder) if p.suffix in (".ckpt", ".json", ".safetensors")]
    if not files:
        return None
    path = draw.choice(files)
    if path.suffix == ".ckpt":
        return _change_checkpoint(path, draw, remove=False)
    if path.suffix == ".safetensors":
        header, data, name = _drawn_tensor(path, draw)
        entry = header[name]
        field = draw.choice(["dtype", "shape", "data_offsets"])
        if field == "dtype":  # of another size or of the same size
            entry[field] = draw.choice(["F16", "F64", "I8", "U32", "X9"])
        else:
            entry[field] = [value + draw.choice([-1, 1, 7]) for value in entry[field]]
        _write_tensors(path, header, data)
        return f"{field} of {name} of {path.name} is {entry[field]}"
    content = _read_json(path)
    sizes = [key for key in _SIZES if isinstance(content, dict) and content.get(key) is not None]
    if sizes and draw.random() < 0.5:
        key = draw.choice(sizes)
        content[key] = draw.choice([size for size in _WRONG_SIZES if size != content[key]])
        said = f"{key} of {path.name} is {content[key]}"
    else:
        owner, key = _place(content, draw)
        if owner is None:
            return None
        value = draw.choice([v for v in _OF_ANOTHER_TYPE if type(v) is not type(owner[key])])
        owner[key] = value
        said = f"{key} of {path.name} is {value!r}"
    _write_json(path, content)
    return said


def _change_checkpoint(path: Path, draw: random.Random, remove: bool) -> str | None:
    """Remove an entry of a checkpoint, or change its type, and renew its seal, as if another
    program or version had written it.
    """
    checkpoint = torch.load(path, weights_only=True)
    owner, key = _place({k: checkpoint[k] for k in _DECIDES}, draw, mappings=True)
    if owner is None or (found := read_seal(path)) is None:
        return None
    if remove:
        del owner[key]
    else:
        owner[key] = draw.choice([v for v in _OF_ANOTHER_TYPE if type(v) is not type(owner[key])])

    def write(file: BinaryIO) -> None:
        torch.save(checkpoint, file)
        seal(file, found.run, found.step)

    write_whole(path, write)
    return f"{key} of {path.name} is {'missing' if remove else repr(owner[key])}"


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]


def _header_end(content: bytes | bytearray) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _read_tensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header of a safetensors file, and its data."""
    content = path.read_bytes()
    end = _header_end(content)
    return json.loads(content[8:end]), content[end:]


def _tensors(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != _METADATA]


def _drawn_tensor(path: Path, draw: random.Random) -> tuple[dict[str, Any], bytes, str]:
    header, data = _read_tensors(path)
    return header, data, draw.choice(_tensors(header))


def _write_tensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _place(content: Any, draw: random.Random, mappings: bool = False) -> tuple[Any, Any]:
    """A container at any depth of a JSON value, and a key or an index of it."""
    found = [*_places(content, mappings)]
    return draw.choice(found) if found else (None, None)


def _places(content: Any, mappings: bool) -> Iterator[tuple[Any, Any]]:
    if isinstance(content, dict):
        keys: Any = list(content)
    elif isinstance(content, list):
        keys = range(len(content))
    else:
        return
    for key in keys:
        if isinstance(content, dict) or not mappings:
            yield content, key
        yield from _places(content[key], mappings)
