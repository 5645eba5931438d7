"""A comparison's bookkeeping with an invented training: what is kept, what fails, what must be equal; and its page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import image_bytes
from rich.console import Console

from cnn_ray import compare
from cnn_ray.compare_page import PUBLISHED, build_page, table_cells
from cnn_ray.comparison_rows import ComparisonResult, Failure, Row, Spread, Training
from cnn_ray.config import CompareConfig, TrainConfig
from cnn_ray.console_training import print_comparison
from cnn_ray.errors import ArtifactError, ConfigError, RunInterruptedError, TrainingError
from cnn_ray.train import TrainResult

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def write_classes(root: Path) -> Path:
    for number, label in enumerate(("cold", "warm")):
        (root / label).mkdir(parents=True)
        for k in range(12):
            (root / label / f"{k}.png").write_bytes(image_bytes(100 * number + k))
    return root


def comparison(folder: Path, **changes: Any) -> CompareConfig:
    settings: dict[str, Any] = {
        "name": "nets",
        "output_uri": str(folder / "comparisons"),
        "seeds": (0, 1),
        "base": {"models_uri": str(folder / "models"), "data": {"uri": str(folder / "images")}},
        "variants": {"small": {"train": {"epochs": 1, "learning_rate": 0.1}}, "large": {"batch_size": 8}},
    }
    return CompareConfig(**settings | changes)


class InventedTraining:
    """Stands in for `run_training`: counts, and fails where it is told to."""

    def __init__(self, fails: dict[tuple[str, int], Exception] | None = None):
        self.seen: list[tuple[str, int]] = []
        self.fails = fails or {}

    def __call__(self, config: TrainConfig) -> TrainResult:
        self.seen.append((config.name, config.seed))
        if error := self.fails.get((config.name, config.seed)):
            raise error
        return TrainResult(f"{config.name}@1", "", {}, "")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measuring is invented too: accuracy is 0.5 for seed 0 and 0.7 for seed 1."""

    def measure(training: TrainConfig, variant: str, seed: int, reference: str, split: str) -> Training:
        accuracy = 0.5 + 0.2 * seed
        history = [{"accuracy": accuracy, "val_accuracy": accuracy, "loss": 1.0, "val_loss": 1.0}] * (1 + seed)
        return Training(variant, seed, reference, split, 4, {"1": accuracy}, 0.5, 10.0, 1000, 4000, history)

    monkeypatch.setattr(compare, "_measure", measure)
    monkeypatch.setattr(compare, "_throughputs", lambda config, done: {"small": (100.0, None), "large": (50.0, None)})
    monkeypatch.setattr(compare, "load_artifact", lambda _uri, reference: reference)
    write_classes(tmp_path / "images")
    return tmp_path


def test_every_variant_and_seed_is_trained_once_and_summed_up(measured):
    train = InventedTraining()
    result = compare.run_comparison(comparison(measured), train=train)
    assert train.seen == [("nets-small", 0), ("nets-small", 1), ("nets-large", 0), ("nets-large", 1)]
    small = result.rows[0]
    assert small.seeds == 2
    assert small.top_k["1"].mean == pytest.approx(0.6)
    assert small.top_k["1"].deviation == pytest.approx(0.1414, abs=1e-4)
    assert small.curves["accuracy"] == pytest.approx([0.6, 0.7])
    assert (small.cpu_images_per_s, small.gpu_images_per_s) == (100.0, None)
    written = json.loads((measured / "comparisons/nets/comparison.json").read_text())
    assert [row["variant"] for row in written["rows"]] == ["small", "large"]
    assert len(written["trainings"]) == 4
    assert (measured / "comparisons/nets/comparison.html").read_text().startswith("<!doctype html>")


def test_a_kept_training_whose_version_was_removed_is_trained_anew(measured, monkeypatch):
    compare.run_comparison(comparison(measured), train=InventedTraining())

    def load(_uri: str, reference: str) -> str:
        if reference == "nets-large@1":
            raise ArtifactError("removed")
        return reference

    monkeypatch.setattr(compare, "load_artifact", load)
    again = InventedTraining()
    compare.run_comparison(comparison(measured), train=again)
    assert again.seen == [("nets-large", 0), ("nets-large", 1)]


def test_a_finished_training_is_kept_and_one_that_changed_is_not(measured):
    compare.run_comparison(comparison(measured), train=InventedTraining())
    again = InventedTraining()
    compare.run_comparison(comparison(measured), train=again)
    assert again.seen == []
    changed = comparison(
        measured, variants={"small": {"train": {"epochs": 2, "learning_rate": 0.1}}, "large": {"batch_size": 8}}
    )
    compare.run_comparison(changed, train=again)
    assert again.seen == [("nets-small", 0), ("nets-small", 1)]
    (measured / "images/warm/new.png").write_bytes(image_bytes(999))
    other_data = InventedTraining()
    compare.run_comparison(comparison(measured), train=other_data)
    assert len(other_data.seen) == 4


def test_a_failed_training_is_named_and_the_others_go_on(measured, capsys):
    broken = InventedTraining({("nets-small", 1): TrainingError("Expected workers. Received: none.")})
    events: list[Any] = []
    result = compare.run_comparison(comparison(measured), on_training=events.append, train=broken)
    assert len(broken.seen) == 4
    assert [(row.variant, row.seeds) for row in result.rows] == [("small", 1), ("large", 2)]
    assert [(f.variant, f.seed) for f in result.failures] == [("small", 1)]
    assert result.rows[0].top_k["1"].deviation is None
    assert print_comparison(result, Console(width=80)) == TrainingError.exit_code
    assert "small, seed 1: failed. Expected workers." in capsys.readouterr().out
    assert sum(isinstance(event, Failure) for event in events) == 1
    repaired = InventedTraining()
    whole = compare.run_comparison(comparison(measured), train=repaired)
    assert repaired.seen == [("nets-small", 1)]
    assert (whole.failures, whole.rows[0].seeds) == ((), 2)
    assert print_comparison(whole, Console(width=80)) == 0


def test_all_failed_is_still_a_page(measured):
    error = TrainingError("Expected workers. Received: none.")
    broken = InventedTraining({(f"nets-{v}", s): error for v in ("small", "large") for s in (0, 1)})
    result = compare.run_comparison(comparison(measured), train=broken)
    assert result.rows == ()
    assert len(result.failures) == 4
    assert "Expected workers" in (measured / "comparisons/nets/comparison.html").read_text()


def test_ctrl_c_ends_the_comparison(measured):
    stopped = InventedTraining({("nets-small", 1): RunInterruptedError("Stopped.")})
    with pytest.raises(RunInterruptedError):
        compare.run_comparison(comparison(measured), train=stopped)
    assert stopped.seen == [("nets-small", 0), ("nets-small", 1)]


def test_variants_must_share_images_and_split(measured):
    train = InventedTraining()
    config = comparison(measured, variants={"small": {}, "other": {"data": {"split_seed": 7}}})
    with pytest.raises(ConfigError, match="same images and split"):
        compare.run_comparison(config, train=train)
    assert train.seen == []


def test_dry_run_says_how_many_and_on_which_side(measured):
    assert compare.dry_run(comparison(measured)) == (
        "Would train small, large with 2 seeds (4 trainings), on validation."
    )


def invented_row(name: str, architecture: str = "ResNet50") -> Row:
    one = Spread(0.5, 0.01)
    curves = {key: [0.4, 0.5] for key in ("accuracy", "val_accuracy", "loss", "val_loss")}
    return Row(name, architecture, None, 2, 25_636_712, 10**8, {"1": one, "5": one}, one, one, 12.0, None, curves)


def test_page_holds_no_script_and_no_reference_outside():
    failure = Failure(HOSTILE, 0, HOSTILE, 75)
    row = invented_row(HOSTILE)
    page = build_page(ComparisonResult(HOSTILE, "test", 10, (row, replace(row, variant="b")), (failure,)))
    assert "<script" not in page
    assert not re.search(r"<img(?! src=\"data:)", page)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count("&lt;script&gt;") >= 5


def test_page_shows_the_published_figures_beside_the_measured_ones():
    rows = tuple(invented_row(name, name) for name in PUBLISHED)
    page = build_page(ComparisonResult("all", "test", 10, rows, ()))
    line = next(line for line in page.splitlines() if "arXiv 1512.03385" in line)
    assert re.findall(r">(2015|0\.749|0\.921|0\.500)<", line) == ["2015", "0.749", "0.921", "0.500", "0.500"]
    assert "flatter" not in page
    assert "flatter" in build_page(ComparisonResult("all", "validation", 10, rows, ()))


def test_cells_without_a_figure_are_a_dash():
    cells = table_cells(invented_row("a"))
    assert cells[2:5] == ("0.500 ± 0.010", "–", "0.500 ± 0.010")
    assert cells[7:9] == ("12", "–")
