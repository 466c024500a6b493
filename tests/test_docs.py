"""What the documentation names exists: imports, names of the package, files, pages."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import secateur

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/RESULTS.md"])
FOLDERS = ("pruning", "modules", "callbacks", "secateur", "configs", "tests", "benchmarks", "docs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\bsc\.(\w+)", text)):
        assert getattr(secateur, name)
    for module, names in re.findall(r"^from (secateur[\w.]*) import (.+)$", text, re.MULTILINE):
        for name in re.findall(r"\w+", names):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    files = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text)
    files += re.findall(r"\bdocs/\w+\.md", text) if page.parent == ROOT else []
    if page.name != "CHANGELOG.md":  # it tells of what was, too
        assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    """As on a forge; `make site` checks those of the site, and headings."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
