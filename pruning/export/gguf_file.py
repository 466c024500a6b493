"""Write a model folder as one GGUF file for llama.cpp and programs built on it.

Stock models (complete, without some blocks, or with all MLPs or attentions narrowed alike) keep the
architecture of their family. Llamas, Mistrals and Qwen2s whose blocks differ in MLP width or number
of heads, or that lack the attention or the MLP of some blocks, become the architecture `deci`,
which stores these numbers per block. llama.cpp cannot represent models that select entries of the
residual stream; they are refused.

Two adjustments make llama.cpp compute the same as the model. If it scales attention scores by its
own factor instead of Gemma's, queries are multiplied by the quotient. It ignores the attention of a
block without MLP, and reads the number of heads from block 0: the former block gets an MLP of width
1, and a block 0 without attention gets an attention of one head, both of zeros.

The file is long because it has tables of what llama.cpp expects of each architecture.

Memory: one tensor. The package `gguf` writes the file; `make test-serving` tests it with llama.cpp.

As a command: `python -m secateur gguf --help`.

Legend: O = output features, I = input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_TENSOR,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)
from rich.console import Console
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.pruning.commands import CommandParser, new_file
from secateur.pruning.export.gguf_tokenizer import add_tokenizer
from secateur.pruning.export.native_shape import NativeShape, read_shape
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.headers import weight_files
from secateur.pruning.heads import head_dim

_F32 = GGMLQuantizationType.F32
TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (_F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""Types of the weights; vectors, such as those of norms, are always float32."""


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp runs a family.

    Args:
        arch: Its name in llama.cpp.
        per_block: The architecture with widths per block, if there is one for the family.
        activation: The only activation of MLPs that it supports.
        biases: Whether the attention may have biases.
        centred: Whether the model stores norm weights centred at 0; llama.cpp expects them at 1.
        period: One block in every `period` has full attention, the others a sliding window; 1 if
            llama.cpp supports no windows.
        largest: Number of blocks of the size of the family for which it scales attention scores by
            another factor.
    """

    arch: MODEL_ARCH
    per_block: MODEL_ARCH | None = None
    activation: str = "silu"
    biases: bool = False
    centred: bool = False
    period: int = 1
    largest: int = 0


_LLAMA = _Architecture(MODEL_ARCH.LLAMA, MODEL_ARCH.DECI, biases=True)
_GELU = "gelu_pytorch_tanh"
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _Architecture(MODEL_ARCH.QWEN2, MODEL_ARCH.DECI),
    "qwen3": _Architecture(MODEL_ARCH.QWEN3),
    "gemma2": _Architecture(MODEL_ARCH.GEMMA2, None, _GELU, False, True, 2, 46),
    "gemma3_text": _Architecture(MODEL_ARCH.GEMMA3, None, _GELU, False, True, 6, 62),
}
# Rotary embedding rotates pairs of neighbours there, in transformers the halves of a head.
_NEIGHBOURS = (MODEL_ARCH.LLAMA, MODEL_ARCH.DECI)


@dataclass(frozen=True)
class _Entry:
    """A tensor of the GGUF file, not read yet.

    Args:
        name: Its name in the file.
        shape: Its shape in the order of numpy.
        kind: Its type in the file.
        read: Function that reads it as float32.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], Tensor]


def write_gguf(folder: str | Path, out: str | Path, kind: str = "f16") -> list[str]:
    """Write a model folder as a GGUF file, which appears when it is complete.

    Args:
        folder: A stock model, or a pruned one with uncut residual stream and heads.
        out: The new file, replaced if it exists.
        kind: Type of the weights, one of `TYPES`.

    Returns:
        Notes on the file for the user, one sentence each.

    Raises:
        ValueError: The type is unknown, or llama.cpp does not support the model or its tokenizer.
    """
    folder, out = Path(folder), Path(out)
    if kind not in TYPES:
        raise ValueError(f"`type` must be one of {', '.join(TYPES)}, got {kind!r}.")
    BaseModel(folder, "folder").judge()
    shape = read_shape(folder)
    architecture = _architecture_of(shape)
    arch = architecture.arch if shape.is_stock else architecture.per_block
    assert arch is not None
    unfinished = out.with_name(f".{out.name}.secateur-partial")
    writer = GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[arch])
    notes = _add_sizes(writer, shape, architecture)
    weights, file_type = TYPES[kind]
    writer.add_name(folder.resolve().name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes += add_tokenizer(writer, folder, shape.config.vocab_size)
    entries = [*_entries(folder, shape, architecture, arch, weights)]
    if narrow := [e for e in entries if len(e.shape) > 1 and e.kind is not weights]:
        notes.append(
            f"{len(narrow)} matrices have rows whose length is not a multiple of 32; they are "
            "written as f16; "
            "`width_multiple: 32` avoids it."
        )
    try:
        _write(writer, entries)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return notes


def _write(writer: GGUFWriter, entries: list[_Entry]) -> None:
    for entry in entries:
        size = math.prod(gguf.quant_shape_to_byte_shape(entry.shape, entry.kind))
        writer.add_tensor_info(entry.name, entry.shape, np.dtype("float32"), size, entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for entry in entries:
            array = gguf.quants.quantize(entry.read().contiguous().numpy(), entry.kind)
            if array.dtype == np.float16 and not np.isfinite(array).all():
                raise ValueError(f"{entry.name} has entries beyond 65504; use `--type bf16`.")
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _architecture_of(shape: NativeShape) -> _Architecture:
    """The row of the family.

    Raises:
        ValueError: llama.cpp does not support a setting of the configuration.
    """
    config = shape.config
    name, found = config.model_type, _ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ValueError(
            f"`gguf` does not write {name!r} models; it writes {', '.join(_ARCHITECTURES)}."
        )
    if not shape.is_stock and found.per_block is None:
        raise ValueError(
            f"llama.cpp has widths per block for Llama, Mistral and Qwen2, not for {name!r} models."
            " Supported are `uniform: true` in the budget, or removing whole blocks."
        )
    wrong = []
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != found.activation:
        wrong.append(f"the activation {activation!r} instead of {found.activation!r}")
    if getattr(config, "attention_bias", False) and not found.biases:
        wrong.append("`attention_bias`")
    if name == "gemma2" and not config.tie_word_embeddings:
        wrong.append("`tie_word_embeddings` false")
    if name == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        wrong.append("no `attn_logit_softcapping` or `final_logit_softcapping`")
    if found.period > 1 and _windows(config):
        expected = [bool((block + 1) % found.period) for block in range(len(shape.groups))]
        if [kind == "sliding_attention" for kind in config.layer_types] != expected:
            wrong.append(
                f"full attention in other blocks than one in every {found.period} (remove blocks "
                f"in complete groups of {found.period}, or only after the last of them)"
            )
    rope = _rope(config)["rope_type"]
    by_tensor = found.arch in _NEIGHBOURS and rope == "llama3"
    if rope not in ("default", "linear") and not by_tensor:
        wrong.append(f"the `rope_type` {rope!r}")
    if wrong:
        raise ValueError(
            f"llama.cpp runs {name!r} models, but not with {'; nor with '.join(wrong)}."
        )
    return found


def _rope(config: PreTrainedConfig, layer_type: str = "full_attention") -> dict[str, Any]:
    """The settings of the rotary embedding, for one type of attention if they differ."""
    parameters: dict[str, Any] = config.rope_parameters
    return {"rope_type": "default", **parameters.get(layer_type, parameters)}


def _windows(config: PreTrainedConfig) -> int | None:
    """Tokens of the sliding window, if some block has one shorter than the context; else None."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = "sliding_attention" in kinds if kinds else config.model_type == "mistral"
    return window if used and window and window < config.max_position_embeddings else None


def _add_sizes(writer: GGUFWriter, shape: NativeShape, architecture: _Architecture) -> list[str]:
    """Write the keys of the architecture; return notes for the user."""
    config, notes = shape.config, []
    context, window = config.max_position_embeddings, _windows(config)
    if window and architecture.period > 1:
        writer.add_sliding_window(window)
    elif window:
        context = window
        notes.append(
            f"llama.cpp has no sliding windows for this family: the context is limited to the "
            f"window of {window} tokens."
        )
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(shape.groups))
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if shape.is_stock:
        writer.add_feed_forward_length(shape.mlp_widths[0])
        writer.add_head_count(heads)
        writer.add_head_count_kv(groups)
    else:
        per_block = [(kept * (heads // groups), kept) for kept in shape.groups]
        if not shape.groups[0]:
            per_block[0] = (1, 1)
        writer.add_feed_forward_length([max(1, width) for width in shape.mlp_widths])
        writer.add_head_count([number for number, _ in per_block])
        writer.add_head_count_kv([number for _, number in per_block])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head_dim(config))
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(_rope(config, "sliding_attention")["rope_theta"])
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    return notes


def _entries(
    folder: Path,
    shape: NativeShape,
    architecture: _Architecture,
    arch: MODEL_ARCH,
    weights: GGMLQuantizationType,
) -> Iterator[_Entry]:
    """All tensors of the file: those of the folder, and zeros for missing parts."""
    config = shape.config
    names = gguf.get_tensor_name_map(arch, len(shape.groups))
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            sizes = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
        for name, size in sizes.items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            written = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if written is None:
                raise ValueError(f"{path} has {name!r}, which llama.cpp does not support.")

            def read(path: Path = path, name: str = name) -> Tensor:
                with safe_open(path, framework="pt") as file:
                    tensor: Tensor = file.get_tensor(name).float()
                return _as_served(tensor, name, config, architecture, arch)

            yield _entry(written, size, read, weights)
    if not shape.is_stock:
        for name, size in _idle(shape).items():
            fill = torch.ones if len(size) == 1 else torch.zeros
            yield _entry(name, size, partial(fill, size), weights)
    if _rope(config)["rope_type"] == "llama3":
        slower, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = _rope(config)["rope_theta"] ** -torch.linspace(0, 1, len(slower) + 1)[:-1]
        yield _Entry("rope_freqs.weight", slower.shape, _F32, lambda: plain / slower)


def _entry(
    name: str, size: tuple[int, ...], read: Callable[[], Tensor], weights: GGMLQuantizationType
) -> _Entry:
    if len(size) == 1:
        return _Entry(name, size, _F32, read)
    fits = size[-1] % gguf.GGML_QUANT_SIZES[weights][0] == 0
    return _Entry(name, size, weights if fits else GGMLQuantizationType.F16, read)


def _idle(shape: NativeShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of the zero tensors of parts that replace missing ones."""
    width, head = shape.config.hidden_size, head_dim(shape.config)
    sizes: dict[tuple[int, MODEL_TENSOR], tuple[int, ...]] = {}
    for block, stays in enumerate(shape.mlp_widths):
        if not stays:
            sizes |= {(block, MODEL_TENSOR.FFN_NORM): (width,)}
            sizes |= {(block, MODEL_TENSOR.FFN_DOWN): (width, 1)}
            sizes |= {(block, kind): (1, width) for kind in _GATE_UP}
    if not shape.groups[0]:
        sizes |= {(0, MODEL_TENSOR.ATTN_NORM): (width,)}
        sizes |= {(0, MODEL_TENSOR.ATTN_OUT): (width, head)}
        sizes |= {(0, kind): (head, width) for kind in _QKV}
    return {
        f"{gguf.TENSOR_NAMES[kind].format(bid=block)}.weight": size
        for (block, kind), size in sizes.items()
    }


_GATE_UP = (MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_UP)
_QKV = (MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V)


def _as_served(
    tensor: Tensor,
    name: str,
    config: PreTrainedConfig,
    architecture: _Architecture,
    arch: MODEL_ARCH,
) -> Tensor:
    """Convert a tensor to the layout of llama.cpp."""
    module = name.split(".")[-2]
    if architecture.centred and module.endswith("norm"):
        tensor = tensor + 1
    if architecture.centred and module == ("q_norm" if "3" in config.model_type else "q_proj"):
        tensor = tensor * _query_factor(config, architecture)
    if arch in _NEIGHBOURS and module in ("q_proj", "k_proj"):
        tensor = _neighbours(tensor, head_dim(config))
    return tensor


def _query_factor(config: PreTrainedConfig, architecture: _Architecture) -> float:
    """The factor of the queries that gives attention scores the scale of the model.

    llama.cpp divides scores by the root of the head size; in the largest size of the family, by the
    root of the model width per head.
    """
    largest = config.num_hidden_layers == architecture.largest
    divisor = config.hidden_size // config.num_attention_heads if largest else head_dim(config)
    return math.sqrt(divisor / config.query_pre_attn_scalar)


def _neighbours(weight_OI: Tensor, size: int) -> Tensor:
    """Interleave the two halves of the rows of every head; O is heads times `size`.

    Example: a head of rows 0 1 2 3 becomes 0 2 1 3.
    """
    halves: Tensor = weight_OI.unflatten(0, (-1, 2, size // 2))
    return halves.transpose(1, 2).reshape(weight_OI.shape)


_HELP = """\
Write a model folder as one GGUF file for llama.cpp, its tokenizer and chat template included.

FOLDER is a stock model (complete, without some blocks, or with all MLPs of one narrower width), or
a pruned Llama, Mistral or Qwen2 with an uncut residual stream: different widths of MLPs per block,
attentions or MLPs removed. llama.cpp does not support other plans: they are refused, and nothing is
written.

example:
  python -m secateur gguf runs/disp/model smaller.gguf --type q8_0
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `python -m secateur gguf FOLDER OUT --type TYPE`."""
    parser = CommandParser("gguf", _HELP)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="model folder: config, safetensors, tokenizer")
    add("out", metavar="OUT", type=new_file((b"GGUF",)), help="new GGUF file, or one to replace")
    add("--type", choices=TYPES, default="f16", help="type of the weights (default: f16)")
    args = parser.parse_args(arguments)
    with parser.naming():
        notes = write_gguf(args.folder, args.out, args.type)
    text = "\n".join([f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB.", *notes])
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
