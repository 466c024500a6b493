from __future__ import annotations

from pathlib import Path

from secateur.pruning.export.publish import publish
from secateur.pruning.export.stages import Origin
from secateur.pruning.measure.report import Report
from tests.pruning.measure.test_verdict import row
from tests.tiny import tiny_folder


def test_the_page_tells_once_how_the_model_was_made(tmp_path: Path) -> None:
    base, folder = tiny_folder(tmp_path / "base"), tiny_folder(tmp_path / "run" / "model")
    refit = {"method": "Refit()", "layers": 7}
    made = {
        "depth": {"removals": ["1"], "compensation": refit},
        "compensation": refit,
        "widths": {"keep": 0.7, "refit": "refit kept: 5.00 with it, 6.00 without"},
    }
    origin = Origin(str(base), base, "0" * 64, "python -m secateur fit", provenance=made)
    publish(Report([row("dense", 10.0), row("pruned", 11.0)], 10, {}), None, origin, folder)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("method: Refit(), layers: 7") == 1
    assert "keep: 0.7, refit: kept: 5.00 with it" in page
    assert "python -m secateur fit" in page
