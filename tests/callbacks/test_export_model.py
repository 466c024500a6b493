from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import LightningModule

from secateur.callbacks import ExportModel
from secateur.pruning.files.model_folder import refuse_foreign
from tests.callbacks.fakes import fake_trainer


class Exporter(LightningModule):
    """Leaves a file behind; what holds such a file is its own."""

    def check_export_folder(self, folder: Path) -> None:
        refuse_foreign(folder, lambda path: (path / "mine").is_file())

    def export(self, folder: Path, command: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "mine").write_text(command)


class Failing(Exporter):
    def export(self, folder: Path, command: str) -> None:
        raise OSError(28, "No space left on device")


def test_it_exports_below_the_output_folder_and_replaces_its_own(tmp_path: Path) -> None:
    callback, trainer = ExportModel(folder="small"), fake_trainer(tmp_path, 100)
    for _ in range(2):
        callback.check_first(trainer, Exporter())
        callback.on_fit_end(trainer, Exporter())
    assert (tmp_path / "small" / "mine").read_text().startswith("python ")


def test_it_says_where_the_model_is_and_how_to_load_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "report.html").touch()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        ExportModel().on_fit_end(fake_trainer(tmp_path, 100), Exporter())
        (tmp_path / "model" / "modeling_secateur_llama.py").touch()
        ExportModel().on_fit_end(fake_trainer(tmp_path, 100), Exporter())
    stock, own = caplog.messages
    assert f"The model is in {tmp_path / 'model'}. Report: {tmp_path / 'report.html'}." in stock
    assert f'from_pretrained("{tmp_path / "model"}")' in stock
    assert f'from_pretrained("{tmp_path / "model"}", trust_remote_code=True)' in own


def test_a_foreign_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "theirs").touch()
    with pytest.raises(ValueError, match="exists and is not what Secateur writes there"):
        ExportModel().setup(fake_trainer(tmp_path), Exporter(), "fit")


def test_a_failure_says_how_to_repeat_the_export(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as failure:
        ExportModel().on_fit_end(fake_trainer(tmp_path, 100), Failing())
    assert "`--ckpt_path last` repeat the export" in failure.value.__notes__[0]


def test_a_module_that_exports_nothing_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`ExportModel` needs a module that exports"):
        ExportModel().check_first(fake_trainer(tmp_path), LightningModule())


def test_a_trial_leaves_nothing(tmp_path: Path) -> None:
    ExportModel().on_fit_end(fake_trainer(tmp_path, fast_dev_run=1), Exporter())
    assert not list(tmp_path.iterdir())


def test_a_run_that_ended_early_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ended after 3 of 100 steps"):
        ExportModel().on_fit_end(fake_trainer(tmp_path, 3), Exporter())


@pytest.mark.parametrize("folder", ["plan", "checkpoints/best", "", ".", "/", "../x", "a/../../x"])
def test_a_folder_elsewhere_or_of_something_else_is_refused(folder: str) -> None:
    with pytest.raises(
        ValueError, match="`folder` of ExportModel .*; choose a.* name, such as model"
    ):
        ExportModel(folder)
