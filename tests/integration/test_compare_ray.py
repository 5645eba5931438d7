"""A comparison and a ready configuration as they are run: real trainings over Ray Train, on miniatures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import write_flowers102, write_packed_cifar10

from cnn_ray.artifact import load_artifact
from cnn_ray.compare import run_comparison
from cnn_ray.config import CompareConfig, TrainConfig, build_config, load_yaml
from cnn_ray.train import run_training

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.mark.slow
def test_flowers102_configuration_runs_on_the_miniature(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_flowers102(tmp_path / "flowers102", per_class=(4, 2, 2))
    keys = load_yaml(JOBS / "flowers102_efficientnetb0.yaml")
    one_epoch = {"epochs": 1, "learning_rate": 1e-3}
    keys |= {"models_uri": str(tmp_path / "models"), "runs_uri": str(tmp_path / "runs")}
    keys["data"] |= {"uri": str(tmp_path / "flowers102")}
    keys["model"] |= {"weights": None, "input_size_px": 32}
    keys["train"] |= one_epoch
    keys["fine_tune"] |= one_epoch
    keys |= {"allow": ["too_many_parameters", "too_few_per_class"]}
    result = run_training(build_config(TrainConfig, keys, source="flowers102"))
    artifact = load_artifact(str(tmp_path / "models"), result.reference)
    assert artifact.labels == load_artifact(str(tmp_path / "models"), "flowers102@1").labels
    assert len(artifact.labels) == 3
    assert [epoch["phase"] for epoch in artifact.description.training["history"]] == ["train", "fine_tune"]


@pytest.mark.slow
def test_two_real_variants_are_measured_on_the_test_part(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = write_packed_cifar10(tmp_path / "small.npz", train=80, test=20)
    config = CompareConfig(
        name="small",
        output_uri=str(tmp_path / "comparisons"),
        seeds=(0,),
        base={
            "models_uri": str(tmp_path / "models"),
            "runs_uri": str(tmp_path / "runs"),
            "data": {"uri": str(data), "near_duplicates": "ignore"},
            "train": {"epochs": 2, "learning_rate": 0.003},
        },
        variants={"lenet5": {"model": {"architecture": "lenet5"}}, "simple": {}},
    )
    result = run_comparison(config)
    assert result.failures == ()
    assert (result.split, result.images) == ("test", 20)
    assert [(row.variant, row.parameters) for row in result.rows] == [("lenet5", 61_026), ("simple", 122_050)]
    assert all(row.cpu_images_per_s and row.cpu_images_per_s > 0 for row in result.rows)
    assert all(len(row.curves["val_loss"]) == 2 for row in result.rows)
    written = json.loads((tmp_path / "comparisons/small/comparison.json").read_text())
    assert [t["reference"] for t in written["trainings"]] == ["small-lenet5@1", "small-simple@1"]
    again = run_comparison(config)
    assert [row.top_k for row in again.rows] == [row.top_k for row in result.rows]
    assert not (tmp_path / "models/small-simple/2").exists()
