"""Write a pruned model in a format built into vLLM: `DeciLMForCausalLM`, `nemotron-nas`.

For Llamas, Mistrals and Qwen2s with uncut residual stream and heads: MLPs of any width per block,
attentions or MLPs removed. The weights are unchanged; config.json is translated. vLLM then runs its
own kernels instead of the modelling file.

The server starts the residual stream at the attention norm of block 0: if block 0 has no attention,
it gets one of zeros.

A width is written as current vLLM reads it, and also, if all are multiples of 256, as earlier
versions and SGLang compute it: `ffn_mult` times two thirds of the width of the residual stream,
rounded up to a multiple of 256.

As a command: `python -m secateur nemotron-nas --help`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from secateur.pruning.commands import CommandParser
from secateur.pruning.export.native_shape import NativeShape, read_shape
from secateur.pruning.families import skeleton
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.finish import copy_companions
from secateur.pruning.files.headers import INDEX
from secateur.pruning.files.model_folder import (
    CONFIG,
    MARK,
    read_stages,
    refuse_base,
    replaced_folder,
    write_json,
)
from secateur.pruning.modelling import configuration_nemotron_nas as configuration

_FAMILIES = ("llama", "mistral", "qwen2")
_MULTIPLE = 256
_IDLE = "model-idle.safetensors"


def write_nemotron_nas(folder: str | Path, out: str | Path) -> list[str]:
    """Write a pruned model as `nemotron-nas`; the folder appears when it is complete.

    Args:
        folder: A pruned model with uncut residual stream and heads.
        out: The new folder; an earlier model of ours in its place is replaced.

    Returns:
        Notes on the folder for the user, one sentence each.

    Raises:
        ValueError: The format does not support the model, or something else exists at `out`.
    """
    folder, out = Path(folder), Path(out)
    refuse_base(out, folder)
    base = BaseModel(folder, "folder")
    base.judge()
    shape = read_shape(folder)
    _refuse(shape, folder)
    with replaced_folder(out) as partial:
        for path in base.weight_files:
            shutil.copyfile(path, partial / path.name)
        if not shape.groups[0]:
            idle = _idle_attention(shape, base.dtype_of())
            save_file(idle, partial / _IDLE, metadata={"format": "pt"})
            places = {name: path.name for name, path in base.tensors.items()}
            places |= dict.fromkeys(idle, _IDLE)
            write_json(partial / INDEX, {"metadata": {}, "weight_map": places})
        source = Path(configuration.__file__)
        shutil.copyfile(source, partial / source.name)
        copy_companions(folder, partial)
        write_json(partial / CONFIG, served_config(shape))
        files = sorted({path.name for path in partial.iterdir()} | {MARK})
        write_json(partial / MARK, {"stages": read_stages(folder), "files": files})
    notes = []
    if odd := _odd_blocks(shape):
        notes.append(
            f"MLPs of blocks {', '.join(map(str, odd))} have widths that are not multiples of "
            f"{_MULTIPLE}: current vLLM supports them, earlier versions and SGLang do not. "
            "`width_multiple: "
            f"{_MULTIPLE}` in the budget avoids this; the report of such a run shows its cost in "
            "perplexity, as aligned and free widths."
        )
    if not shape.groups[0]:
        notes.append("Block 0 has no attention; one of zeros was added, which vLLM needs to start.")
    return notes


def served_config(shape: NativeShape) -> dict[str, Any]:
    """The configuration as the server reads it, with all defaults of the family written out."""
    config = shape.config
    entry = f"{Path(configuration.__file__).stem}.{configuration.NemotronNasConfig.__name__}"
    group = config.num_attention_heads // config.num_key_value_heads
    attentions = [
        {"no_op": False, "n_heads_in_group": group} if there or block == 0 else {"no_op": True}
        for block, there in enumerate(shape.groups)
    ]
    mlps = [_mlp(width, config.hidden_size) for width in shape.mlp_widths]
    if _odd_blocks(shape):
        for mlp in mlps:
            mlp.pop("ffn_mult", None)
    own = {"qkv_bias": True} if config.model_type == "qwen2" else {}
    return {
        **config.to_dict(),
        **own,
        "model_type": configuration.NemotronNasConfig.model_type,
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": entry},
        "block_configs": [
            {"attention": attention, "ffn": mlp}
            for attention, mlp in zip(attentions, mlps, strict=True)
        ],
    }


def _mlp(width: int, hidden: int) -> dict[str, Any]:
    """The settings of an MLP; the multiplier is for half an entry less, since it is rounded up."""
    if not width:
        return {"no_op": True}
    multiplier = 1.5 * (width - 0.5) / hidden
    return {"no_op": False, "intermediate_size": width, "ffn_mult": multiplier}


def _odd_blocks(shape: NativeShape) -> list[int]:
    """Blocks whose MLP width is not a multiple of 256."""
    return [block for block, width in enumerate(shape.mlp_widths) if width % _MULTIPLE]


def _refuse(shape: NativeShape, folder: Path) -> None:
    """Refuse models that vLLM runs unchanged, or that the format does not support.

    Raises:
        ValueError: The model is one of these.
    """
    config = shape.config
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"vLLM supports different blocks for Llama, Mistral and Qwen2, not for "
            f"{config.model_type!r} models. It serves {folder} unchanged with "
            "`--trust-remote-code --model-impl transformers`."
        )
    if shape.is_stock:
        raise ValueError(f"{folder} is a stock model, which vLLM serves unchanged.")
    if not shape.has_full_heads:
        raise ValueError(
            f"{folder} has key-value heads {', '.join(map(str, shape.groups))} in its blocks, and "
            "this format has one number of query heads for all. Write it with `gguf`, or prune "
            "heads with `budget.uniform: true`."
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"vLLM runs such models with `hidden_act` 'silu', not {config.hidden_act!r}."
        )


def _idle_attention(shape: NativeShape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zero tensors for the attention of block 0."""
    wanted = tuple(f"model.layers.0.{module}." for module in ("self_attn", "input_layernorm"))
    tensors = skeleton(shape.config).state_dict().items()
    return {
        name: torch.zeros(tensor.shape, dtype=dtype)
        for name, tensor in tensors
        if name.startswith(wanted)
    }


_HELP = """\
Write a pruned model in a format built into vLLM (`DeciLMForCausalLM`, `nemotron-nas`).

FOLDER is a pruned Llama, Mistral or Qwen2 with an uncut residual stream: different widths of MLPs
per block, attentions or MLPs removed. vLLM then runs its own kernels. The format does not support
other plans: they are refused, and nothing is written. The code in OUT only reads its configuration.

example:
  python -m secateur nemotron-nas runs/disp/model served
  vllm serve served --trust-remote-code
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `python -m secateur nemotron-nas FOLDER OUT`."""
    parser = CommandParser("nemotron-nas", _HELP)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="model folder: config, safetensors, tokenizer")
    add("out", metavar="OUT", type=Path, help="new folder, or a pruned model to replace")
    args = parser.parse_args(arguments)
    with parser.naming():
        notes = write_nemotron_nas(args.folder, args.out)
    text = "\n".join([f"Written to {args.out}.", *notes])
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
