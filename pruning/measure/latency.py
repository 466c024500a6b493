"""Measure the table of times that a latency budget reads, where the model is served.

As a command: `python -m secateur latency --help`. How: `secateur.pruning.measure.latency_bench`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from secateur.pruning.commands import JSON, CommandParser, new_file
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.measure.latency_bench import Bench, Measurement
from secateur.pruning.measure.latency_table import LatencyTable
from secateur.pruning.modelling import is_narrow

_HELP = """\
Measure how long attention and MLP of a model take at every width, on this machine, and write a
table that a budget reads:

  python -m secateur latency path/to/model --output table.json
  python -m secateur fit --config configs/disp.yaml --model.base path/to/model ... \\
      --model.budget.cost Latency --model.budget.cost.table table.json --model.budget.keep 0.7

Only config.json of the model is read: weights are random. Run it where the model will be served,
with the threads, type of weights, prompt and batch of the service, and with nothing else running;
on a shared CPU, use --cpu-time and one thread (OMP_NUM_THREADS=1).
"""


def measure_latency(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, how: Measurement
) -> LatencyTable:
    """Measure the times of the parts of a model.

    Args:
        config: Configuration of a stock model of a known family.
        dtype: Type of the weights.
        device: Device that computes.
        how: How times are measured.

    Raises:
        ValueError: The family is unknown, its blocks differ in width, the prompt does not fit its
            positions, or processor time is asked of several threads or a GPU.
    """
    if is_narrow(config.model_type):
        raise ValueError(
            "The blocks of this model differ in width already; measure the model that it was made "
            "from."
        )
    if how.cpu_time and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise ValueError(
            "`--cpu-time` needs a CPU and one thread, since waiting threads count as well; set "
            "OMP_NUM_THREADS=1."
        )
    tokens, positions = how.prompt_tokens + how.new_tokens, config.max_position_embeddings
    if tokens > positions:
        raise ValueError(
            f"`--prompt-tokens` {how.prompt_tokens} and `--new-tokens` {how.new_tokens} are more "
            f"than the {positions} positions of the model; lower them."
        )
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        return Bench(config, dtype, device, how).table()


def told(table: LatencyTable) -> Iterator[str]:
    """What was measured, line by line."""
    points = max(map(len, table.grid.values()))
    yield (
        f"Measured on {table.measured_on}, {table.clock} time: prefill of {table.batch_size} x "
        f"{table.prompt_tokens} tokens, decoding of {table.new_tokens} behind it, up to {points} "
        f"widths per site."
    )
    for name, phase in table.phases.items():
        off = [value - 1 for value in phase.checks]
        yield (
            f"{name}: {len(off)} whole models took {phase.factor:.3f} of the sum of their parts, "
            f"corrected by the table; {min(off):+.1%} to {max(off):+.1%} remain. Spread between "
            f"rounds {phase.spread:.1%}."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = CommandParser("latency", _HELP)
    add, usual = parser.add_argument, Measurement()
    add("model", metavar="MODEL", help="folder of the model, or a hub id")
    where = new_file(JSON)
    add("--output", type=where, required=True, metavar="FILE", help="where the table goes, JSON")
    add("--prompt-tokens", type=int, default=usual.prompt_tokens, help="of a prefill (%(default)s)")
    add("--new-tokens", type=int, default=usual.new_tokens, help="decoded behind it (%(default)s)")
    add("--batch-size", type=int, default=usual.batch_size, help="sequences (%(default)s)")
    add("--points", type=int, default=usual.points, help="widths per site at most (%(default)s)")
    add("--multiple", type=int, help="of all widths (default: that of a budget)")
    add("--rounds", type=int, default=usual.rounds, help="repetitions of everything (%(default)s)")
    add("--dtype", default="auto", help="type of the weights, such as bfloat16 (that of the files)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"torch device (default here: {device})")
    add("--cpu-time", action="store_true", help="processor time, of one thread of a CPU")
    add("--seed", type=int, default=usual.seed, help="of widths, order and weights (%(default)s)")
    args = parser.parse_args(arguments)
    base = BaseModel(args.model, "MODEL")
    how = Measurement(
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        batch_size=args.batch_size,
        points=args.points,
        multiple=args.multiple,
        rounds=args.rounds,
        cpu_time=args.cpu_time,
        seed=args.seed,
    )
    table = measure_latency(base.config, base.dtype_of(args.dtype), torch.device(args.device), how)
    table.save(args.output)
    for line in told(table):
        Console(soft_wrap=True, highlight=False).print(line, markup=False)
