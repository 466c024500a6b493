"""What the site adds to the pages of docs/: pages from elsewhere, and the public names.

MkDocs calls these functions, see `hooks` in mkdocs.yml.
"""

from __future__ import annotations

import ast
import re
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
}
"""File of the repository to the page that it becomes."""

API = {
    "budgets": (
        "Budgets and plans",
        ("pruning.plan", "pruning.costs", "pruning.widths.budget", "pruning.widths.latency"),
    ),
    "widths": ("Widths", ("pruning.widths", "pruning.schedules", "pruning.losses")),
    "depth": ("Blocks", ("pruning.depth",)),
    "weights": ("Single weights", ("pruning.weights", "pruning.blocks")),
    "export": (
        "Export and measures",
        ("pruning.files", "pruning.export", "pruning.measure", "pruning.lora"),
    ),
    "modules": ("Training modules", ("modules",)),
    "callbacks": ("Callbacks", ("callbacks",)),
}
"""Page to its title and the modules whose public names it tells, the first page that fits."""

_HYPHEN = "&#8209;"  # no line ends at it
_SETTINGS_ONLY = ("modules", "callbacks")
"""Pages whose classes are used by their settings; their methods are called by Lightning."""

_sources = Path(tempfile.mkdtemp(prefix="secateur-site-"))


@event_priority(100)  # before the plugin that reads docstrings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay the packages out as they are installed, where their docstrings are read."""
    shutil.copytree(ROOT / "secateur", _sources / "secateur", dirs_exist_ok=True)
    with (ROOT / "pyproject.toml").open("rb") as file:
        places = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    for name, folder in places.items():
        shutil.copytree(ROOT / folder, _sources.joinpath(*name.split(".")), dirs_exist_ok=True)
    plugin: Any = config.plugins["mkdocstrings"]
    plugin.config.handlers["python"]["paths"] = [str(_sources)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere, and those of the public names."""
    for path, page in ELSEWHERE.items():
        text = (ROOT / path).read_text("utf-8")
        files.append(File.generated(config, page, content=_inside(text)))
    for name, text in api_pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave docs/ to the pages that these files became; keep dates on a line."""
    for path, name in ELSEWHERE.items():
        markdown = markdown.replace(f"](../{path}", f"]({name}")
    return re.sub(
        r"^\| (\d{4})-(\d\d)-(\d\d) ", rf"| \1{_HYPHEN}\2{_HYPHEN}\3 ", markdown, flags=re.M
    )


def on_post_build(config: MkDocsConfig) -> None:
    """Remove the copies."""
    shutil.rmtree(_sources)


def api_pages() -> dict[str, str]:
    """Page to its Markdown: every public name of `secateur`, by its module.

    Raises:
        ValueError: A module belongs to no page.
    """
    tree = ast.parse((ROOT / "secateur" / "__init__.py").read_text("utf-8"))
    homes: dict[str, tuple[str, ...]] = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES"
    )
    pages = {
        name: [f"# {title}", "All names are those of `import secateur as sc`."]
        for name, (title, _) in API.items()
    }
    for home, names in homes.items():
        fits = (n for n, (_, modules) in API.items() if f"{home}.".startswith(_dotted(modules)))
        if (page := next(fits, None)) is None:
            raise ValueError(f"`API` in docs/hooks.py has no page for {home} of secateur.")
        options = "\n    options: { members: false }" if page in _SETTINGS_ONLY else ""
        pages[page] += [f"::: secateur.{home}.{name}{options}" for name in names]
    return {name: "\n\n".join(lines) + "\n" for name, lines in pages.items()}


def _inside(text: str) -> str:
    """Links to docs/ from elsewhere, as links of a page of docs/."""
    return text.replace("](../docs/", "](").replace("](docs/", "](")


def _dotted(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{module}." for module in modules)
