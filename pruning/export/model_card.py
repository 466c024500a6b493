"""The README.md of an exported model: where it comes from, what it costs, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.pruning.costs import Cost, Flops, Parameters
from secateur.pruning.export.configuration import stock_fields
from secateur.pruning.export.stages import Origin, figures, plain, stages_table
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.heads import HEADS
from secateur.pruning.measure.report import Report
from secateur.pruning.measure.verdict import Grade, Verdict
from secateur.pruning.modelling import is_narrow
from secateur.pruning.plan import Plan

Table = Sequence[Sequence[str]]


@dataclass(frozen=True)
class ModelCard:
    """The contents of a model card.

    No time is included, so that equal contents give equal texts.

    Args:
        title: Heading, usually the name of the model.
        base_model: Name on the hub, or path, of the model that was pruned.
        fingerprint: Content hash of the base model.
        summary: Sentences on what was done to the base model.
        verdict: Sentences on how it compares with the base model; empty if it was not measured.
        stock: Whether the model loads without custom code.
        tables: Heading of a section to its table, whose first row has the column names; empty
            tables are left out.
        widths: The kept widths as text, or None.
        provenance: How the model was made: JSON values only.
        command: The command that made the model.
        versions: Package to version.
        licence: Identifier of the licence of the base model, such as `apache-2.0`, or None.
        tags: Tags for the hub, beside `secateur` and `pruned`.
    """

    title: str
    base_model: str
    fingerprint: str
    summary: str
    verdict: str = ""
    stock: bool = True
    tables: Mapping[str, Table] = field(default_factory=dict)
    widths: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    licence: str | None = None
    tags: Sequence[str] = ()

    def render(self) -> str:
        """Make the text of README.md, YAML header included.

        Raises:
            ValueError: The rows of a table differ in length.
        """
        loading = _LOADING if self.stock else _OWN_CODE_LOADING
        sections = [self._header(), f"# {plain(self.title)}", self.verdict, self.summary]
        sections = [*filter(None, sections), loading]
        for name, rows in self.tables.items():
            if rows:
                sections += [f"## {name}", _markdown(name, rows)]
        if self.widths:
            sections += ["## Widths", f"```\n{self.widths}\n```"]
        facts = [
            ("base model", plain(self.base_model)),
            ("fingerprint of the base model", self.fingerprint),
            *sorted(self.versions.items()),
            *(
                (plain(name), plain(json.dumps(value)))
                for name, value in sorted(self.provenance.items())
            ),
        ]
        sections += ["## Origin", "\n".join(f"- {name}: {value}" for name, value in facts)]
        if self.command:
            sections.append(f"```\n{plain(self.command)}\n```")
        return "\n\n".join(sections) + "\n"

    def _header(self) -> str:
        # JSON strings are YAML strings, whatever they contain.
        lines = [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            f"base_model: {json.dumps(self.base_model)}",
            *([f"license: {json.dumps(self.licence)}"] if self.licence else []),
            "tags:",
            *(f"- {json.dumps(tag)}" for tag in ("secateur", "pruned", *self.tags)),
            "---",
        ]
        return "\n".join(lines)


def card(
    origin: Origin,
    report: Report | None,
    plan: Plan | None,
    stages: list[dict[str, Any]],
    proven: str,
) -> str:
    """Write the model card of an export; without times, so that equal runs give equal cards.

    Args:
        origin: Base model, command and provenance.
        report: Base model and new model side by side; None if they were not measured.
        plan: The kept indices; None if no width was cut.
        stages: All stages that led to the model.
        proven: A sentence on what was verified.

    Returns:
        The text of README.md.
    """
    before = origin.base_model
    tables = {
        "Budget": _plan_budget(before, plan, report) if plan else _counted_budget(report),
        "Quality": _quality(report),
        "Stages": stages_table(stages) if len(stages) > 1 else (),
    }
    if plan is None:
        stock = not is_narrow(before.config.model_type)
    else:
        stock = stock_fields(before.config, plan) is not None
    verdicts = list(report.untimed().verdicts().values()) if report else []
    training = {"training": dict(origin.training)} if origin.training else {}
    return ModelCard(
        title=_title(origin, plan, report, verdicts),
        base_model=origin.name,
        fingerprint=origin.fingerprint,
        verdict=" ".join(verdict.text for verdict in verdicts),
        summary=" ".join((_what_was_done(origin), *_what_stays(plan, stock), proven)),
        stock=stock,
        tables=tables,
        widths=plan.describe() if plan else None,
        provenance={**origin.provenance, **training},
        command=origin.shown_command,
        versions=origin.versions(),
        tags=tuple(origin.provenance),
    ).render()


def _title(
    origin: Origin, plan: Plan | None, report: Report | None, verdicts: Sequence[Verdict]
) -> str:
    title = f"{origin.described()}, {_what_is_left(origin, plan, report)}"
    if any(verdict.grade is Grade.COLLAPSED for verdict in verdicts):
        title += ": QUALITY HAS COLLAPSED"
    return title


def _what_is_left(origin: Origin, plan: Plan | None, report: Report | None) -> str:
    kept = None if plan is None else plan.provenance.get("kept")
    if plan is not None and isinstance(kept, float):
        return f"pruned to {kept:.1%} of its {plan.provenance.get('counted', 'cost')}"
    if not origin.provenance:
        return "trained further"
    if report is None:
        return "pruned"
    dense, made = (row.counts.parameters for row in report.rows)
    left = f"pruned to {made / dense:.1%} of its parameters"
    if zeros := origin.provenance.get("weights", {}).get("model_sparsity"):
        left += f", {zeros:.1%} of them zero"
    return left


def _what_was_done(origin: Origin) -> str:
    methods = " and ".join(map(plain, origin.provenance))
    done = [f"pruned ({methods})"] if methods else []
    if origin.training or not methods:
        tokens = origin.training.get("tokens")
        on = f" on {tokens:,} tokens" if tokens else ""
        done.append(f"trained for {origin.steps} steps{on}")
    return f"`{plain(origin.name)}`, {' and '.join(done)} by Secateur."


def _what_stays(plan: Plan | None, stock: bool) -> list[str]:
    """Sentences on widths, gains, and removed parts."""
    gains = ""
    if plan is not None and plan.gains is not None:
        gains = ", and each kept entry a learned gain in the weights"
    gone = [_gone(plan)] if plan is not None and _gone(plan) else []
    if not stock:
        return [_OWN_WIDTHS.format(gains=gains), *gone]
    if plan is None or all(w in (0, s.size) for s, w in zip(plan.sites, plan.widths, strict=True)):
        return ["This is a stock model of its family.", *gone]
    widths = plan.stock_widths() or {}
    kept = f"{widths['mlp_mid']} neurons are kept in the MLP of every block"
    if HEADS in widths:
        kept += f", and {widths[HEADS]} key-value heads with their queries in its attention"
    return [_STOCK_WIDTHS.format(kept=kept, gains=gains), *gone]


def _gone(plan: Plan) -> str:
    """A sentence on the removed parts, empty if there are none."""
    keep, blocks = plan.kept_blocks(), range(len(plan.widths_by_block()))
    gone_parts = plan.removed_parts
    gone = {
        "all of blocks": [block for block in blocks if block not in keep],
        "the attention of blocks": [block for block in keep if (block, "attn") in gone_parts],
        "the MLP of blocks": [block for block in keep if (block, "mlp") in gone_parts],
    }
    found = [f"{what} {', '.join(map(str, places))}" for what, places in gone.items() if places]
    return f"Removed entirely, numbered as in the base model: {'; '.join(found)}." if found else ""


def _plan_budget(base: BaseModel, plan: Plan, report: Report | None) -> Table:
    """What the plan leaves; operations of the whole model at the context of the report."""
    whole = Flops(True) if report is None else Flops(True, report.context_tokens)
    at = f"{whole.label} per token at {whole.context_tokens} tokens of context"
    costs: dict[str, Cost] = {cost.label: cost for cost in (Parameters(), Parameters(True))}
    costs |= {f"{Flops().label} per token": Flops(), at: whole}
    widths_S = torch.tensor([float(width) for width in plan.widths])
    model, rows = base.skeleton(), [_BUDGET]
    for label, cost in costs.items():
        table = cost.table(model, plan.family)
        rows.append(_kept(label, float(table.dense), float(table(widths_S))))
    return rows


def _counted_budget(report: Report | None) -> Table:
    if report is None:
        return ()
    dense, made = (figures(row, report.context_tokens) for row in report.rows)
    at = f"at {report.context_tokens} tokens of context"
    names = {"parameters": "parameters", "flops_per_token": f"flops per token {at}"}
    return [
        _BUDGET,
        *(_kept(label, float(dense[key]), float(made[key])) for key, label in names.items()),
    ]


_BUDGET = ["counted", "dense", "kept", "fraction"]


def _kept(label: str, dense: float, kept: float) -> list[str]:
    return [label, f"{dense:,.0f}", f"{kept:,.0f}", f"{kept / dense:.4f}"]


def _quality(report: Report | None) -> Table:
    if report is None:
        return ()
    dense, made = report.rows
    return [["text", "dense perplexity", f"{made.name} perplexity"]] + [
        [text, f"{dense.perplexity[text].value:.3f}", f"{made.perplexity[text].value:.3f}"]
        for text in dense.perplexity
    ]


_OWN_WIDTHS = """\
Which entries of the residual stream a block reads and writes differs from block to block:
`config.json` has the widths, the weights have the indices{gains}."""

_STOCK_WIDTHS = """\
{kept}; which ones differs between blocks{gains}. This
is a stock model of its family."""

_OWN_CODE_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=False)
```

`trust_remote_code` runs the Python files of the folder, which need nothing but torch and
transformers. The tokenizer needs none of them; without the setting, transformers asks."""

_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""


def _markdown(name: str, rows: Table) -> str:
    """Write a table in Markdown.

    Raises:
        ValueError: The rows differ in length.
    """
    heading, *body = rows
    if any(len(row) != len(heading) for row in body):
        raise ValueError(f"The rows of the table {name!r} of the model card differ in length.")
    lines = [heading, ["---"] * len(heading), *body]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
