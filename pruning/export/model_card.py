"""The README.md of a pruned model: where it comes from, what it costs, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.pruning.plan import Plan

Table = Sequence[Sequence[str]]


@dataclass(frozen=True)
class ModelCard:
    """What a model card says beside the plan.

    Equal cards of equal plans are equal texts: no time of day is added.

    Args:
        title: Heading, usually the name of the model.
        base_model: Name on the hub, or path, of the model that was pruned.
        budget: Table of what was asked for and what stays; the first row is the heading.
        quality: Table of quality of dense and pruned; the first row is the heading.
        speed: Table of speed and memory of dense and pruned; the first row is the heading.
        stages: Table of the models from which one after the other was made, where the base model
            came out of Secateur itself; the first row is the heading.
        command: The command that made the model.
        versions: Package to version.
        licence: Identifier of the licence of the base model, such as `apache-2.0`, or None.
        date: Date as text, or None.
        tags: Tags for the hub, beside `secateur` and `pruned`.
    """

    title: str
    base_model: str
    budget: Table = ()
    quality: Table = ()
    speed: Table = ()
    stages: Table = ()
    command: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    licence: str | None = None
    date: str | None = None
    tags: Sequence[str] = ()

    def render(self, plan: Plan) -> str:
        """The text of README.md, YAML header included.

        Raises:
            ValueError: The rows of a table differ in length.
        """
        width = plan.stock_mlp_width()
        summary, loading = (
            (_SUMMARY, _LOADING) if width is None else (_STOCK_SUMMARY, _STOCK_LOADING)
        )
        gains = "" if plan.gains is None else ", and each kept entry a learned gain in the weights"
        summary = summary.format(base_model=self.base_model, width=width, gains=gains) + _gone(plan)
        origin = {"base model": self.base_model, "fingerprint of the base model": plan.base}
        return self.page(
            summary + _VERIFIED,
            loading,
            widths=_widths(plan),
            origin=origin | ({"date": self.date} if self.date else {}),
            provenance=plan.provenance,
        )

    def render_weights(
        self,
        base: str,
        summary: str,
        provenance: Mapping[str, Any],
        plan: Plan | None = None,
    ) -> str:
        """The text of README.md of a model whose own weights were trained or pruned.

        Args:
            base: Fingerprint of the base model.
            summary: What was done to the base model, in sentences.
            provenance: How; JSON values only.
            plan: What stays of each block, None if the model is stock.

        Raises:
            ValueError: The rows of a table differ in length.
        """
        origin = {"base model": self.base_model, "fingerprint of the base model": base}
        if plan is None:
            return self.page(summary, _STOCK_LOADING, None, origin, provenance)
        return self.page(summary, _LOADING, _widths(plan), origin, provenance)

    def page(
        self,
        summary: str,
        loading: str,
        widths: str | None,
        origin: Mapping[str, str],
        provenance: Mapping[str, Any],
    ) -> str:
        """The text of README.md from its parts; see `render` and `render_weights`."""
        sections = [self._header(), f"# {self.title}", summary, loading]
        for name, rows in (
            ("Budget", self.budget),
            ("Quality", self.quality),
            ("Speed and memory", self.speed),
            ("Stages", self.stages),
        ):
            if rows:
                sections += [f"## {name}", _markdown(name, rows)]
        if widths:
            sections += ["## Widths", widths]
        facts = [*origin.items(), *sorted(self.versions.items())]
        facts += [(name, json.dumps(value)) for name, value in sorted(provenance.items())]
        sections += ["## Origin", "\n".join(f"- {name}: {value}" for name, value in facts)]
        if self.command:
            sections.append(f"```\n{self.command}\n```")
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


def _widths(plan: Plan) -> str:
    return f"```\n{plan.describe()}\n```"


def _gone(plan: Plan) -> str:
    """A sentence on the parts that go as a whole, nothing where none does."""
    keep, blocks = plan.kept_blocks(), range(len(plan.widths_by_block()))
    gone = {
        "all of blocks": [block for block in blocks if block not in keep],
        "the attention of blocks": [block for block in keep if not plan.keeps(block, "attn")],
        "the MLP of blocks": [block for block in keep if not plan.keeps(block, "mlp")],
    }
    found = [f"{what} {', '.join(map(str, places))}" for what, places in gone.items() if places]
    return f"Gone as a whole, counted as in the base model: {'; '.join(found)}. " if found else ""


_SUMMARY = """\
`{base_model}`, pruned by Secateur to the widths below. Which entries of the residual stream a block
reads and writes differs from block to block: `config.json` has the widths, the weights have the
indices{gains}. """

_STOCK_SUMMARY = """\
`{base_model}`, pruned by Secateur to {width} neurons in the MLP of every block; which ones stay
differs from block to block{gains}. This is a stock model of its family. """

_VERIFIED = """\
Before this folder was put in its place, its logits were compared with those of the masked base
model, on whole windows and in a cached decode."""

_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
```

`trust_remote_code` runs `modeling_secateur.py` from the folder, which needs nothing but torch and
transformers."""

_STOCK_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""


def _markdown(name: str, rows: Table) -> str:
    """A table in Markdown.

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
