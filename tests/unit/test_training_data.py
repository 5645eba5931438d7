"""Training data as people have them: unreadable files, folders of a split, junk, classes that are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_ray.config import DataConfig, ModelDefinition, TrainConfig
from cnn_ray.dataset import SPLITS, LabelledSet, describe_set, read_labelled_set
from cnn_ray.errors import ConfigError, DataError
from cnn_ray.guards import check_config, raise_errors

PAGE = b"<!doctype html><html>404 not found</html>"


def draw(folder: Path, count: int, seed: int = 0) -> None:
    """Write noise, so that no two images look alike."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([seed, *folder.name.encode()])
    for k in range(count):
        pixels = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:03}.png")


def spoil(folder: Path, count: int) -> None:
    """Replace the first images by error pages, as crawlers save them."""
    for path in sorted(folder.iterdir())[:count]:
        path.write_bytes(PAGE)


def read(root: Path, **settings: object) -> LabelledSet:
    return read_labelled_set(DataConfig(uri=str(root), **settings))  # pyright: ignore[reportArgumentType]


def sides(labelled: LabelledSet) -> dict[str, int]:
    return {split: len(labelled.rows(split)) for split in SPLITS}


@pytest.mark.parametrize("near_duplicates", ["keep_together", "ignore"])
def test_unreadable_images_are_counted_and_belong_to_no_side(tmp_path, near_duplicates):
    draw(tmp_path / "cat", 40)
    draw(tmp_path / "dog", 40)
    spoil(tmp_path / "dog", 3)
    labelled = read(tmp_path, near_duplicates=near_duplicates)
    assert labelled.left_out.unreadable == {"not_an_image": 3}
    assert sum(sides(labelled).values()) == 77
    assert not {uri for uri in labelled.uris if Path(uri).read_bytes() == PAGE}
    said = " ".join(describe_set(labelled))
    assert "not_an_image 3" in said
    assert str(tmp_path / "dog" / "000.png") in said


def test_too_many_unreadable_images_stop_before_the_training_and_the_advice_works(tmp_path):
    draw(tmp_path / "cat", 20)
    draw(tmp_path / "dog", 20)
    spoil(tmp_path / "dog", 5)
    with pytest.raises(DataError, match=r"not_an_image 5.*--data-max-unreadable-rate"):
        read(tmp_path)
    assert sum(sides(read(tmp_path, max_unreadable_rate=0.2)).values()) == 35


def test_a_class_without_a_readable_image_is_an_error_whose_advice_works(tmp_path):
    for name in ("cat", "dog", "fox"):
        draw(tmp_path / name, 20)
    spoil(tmp_path / "dog", 20)
    with pytest.raises(DataError, match=r"none of 'dog'.*--data-labels cat,fox"):
        read(tmp_path, max_unreadable_rate=1)
    labelled = read(tmp_path, labels=("cat", "fox"))
    assert labelled.left_out.other_labels == {"dog": 20}


def test_guards_count_readable_images(tmp_path):
    draw(tmp_path / "cat", 60)
    draw(tmp_path / "dog", 13)
    spoil(tmp_path / "dog", 9)
    config = TrainConfig(
        name="x",
        data=DataConfig(uri=str(tmp_path), max_unreadable_rate=0.5),
        model=ModelDefinition(architecture="simple_cnn"),
    )
    findings = check_config(config, read_labelled_set(config.data))
    few = next(finding for finding in findings if finding.guard == "too_few_per_class")
    assert "dog has 1" in few.saw, "4 of its 13 files can be read"


NAMES = [("train", "val", "test"), ("Train", "Validation", "Test"), ("training", "valid", "testing")]


@pytest.mark.parametrize("names", NAMES)
def test_folders_named_like_a_split_above_the_classes_are_the_split(tmp_path, names):
    for name, count in zip(names, (6, 3, 2), strict=True):
        for label in ("cat", "dog"):
            draw(tmp_path / name / label, count, seed=count)
    labelled = read(tmp_path)
    assert labelled.labels == ("cat", "dog")
    assert sides(labelled) == {"train": 12, "validation": 6, "test": 4}


def test_without_a_validation_folder_validation_is_drawn_from_train(tmp_path):
    for name, count in (("train", 20), ("test", 4)):
        for label in ("cat", "dog"):
            draw(tmp_path / name / label, count, seed=count)
    assert sides(read(tmp_path)) == {"train": 32, "validation": 8, "test": 8}


def test_a_class_may_be_called_train(tmp_path):
    """Vehicles: there is no folder below it."""
    for label in ("car", "train", "bus"):
        draw(tmp_path / label, 10)
    assert read(tmp_path).labels == ("bus", "car", "train")


def test_split_folders_beside_class_folders_are_an_error(tmp_path):
    draw(tmp_path / "train" / "cat", 5)
    draw(tmp_path / "dog", 5)
    with pytest.raises(DataError, match="train/ with folders in it beside dog/"):
        read(tmp_path)


def test_split_folders_without_classes_are_an_error(tmp_path):
    draw(tmp_path / "train", 5)
    draw(tmp_path / "test", 5)
    with pytest.raises(DataError, match="only test, train, which name parts of a split"):
        read(tmp_path)


def test_junk_folders_are_no_classes_and_empty_ones_are_said(tmp_path):
    for name in ("cat", "dog", ".git", "__MACOSX", "@eaDir", ".ipynb_checkpoints", "_temporary", "lost+found"):
        draw(tmp_path / name, 10)
    (tmp_path / "fox").mkdir()
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "cat" / "._000.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("hello")
    labelled = read(tmp_path)
    assert (labelled.labels, len(labelled.uris)) == (("cat", "dog"), 20)
    assert labelled.left_out.empty_classes == ("fox",)
    assert labelled.left_out.outside_classes == 1
    said = " ".join(describe_set(labelled))
    assert "fox" in said
    assert "1 files" in said


def test_patterns_leave_sidecars_out(tmp_path):
    for name in ("cat", "dog"):
        draw(tmp_path / name, 10)
        for k in range(10):
            (tmp_path / name / f"{k:03}.json").write_text("{}")
        draw(tmp_path / name / "thumbs", 4, seed=7)
    with pytest.raises(DataError, match="not_an_image 20"):
        read(tmp_path)
    labelled = read(tmp_path, include=("*.png",), exclude=("*/thumbs/*",))
    assert (len(labelled.uris), labelled.left_out.by_pattern) == (20, 28)
    assert "28 files" in " ".join(describe_set(labelled))


@pytest.mark.parametrize("name", ["val", "valid", "VALIDATION", "dev"])
def test_a_manifest_may_call_validation_by_its_usual_names(tmp_path, name):
    draw(tmp_path, 12)
    rows = [f"{k:03}.png,{'ab'[k % 2]},{(name, 'Train', 'test')[k // 4]}" for k in range(12)]
    (tmp_path / "m.csv").write_text("\n".join(["uri,label,part", *rows]))
    labelled = read(tmp_path / "m.csv", split_column="part")
    assert sides(labelled) == {"train": 4, "validation": 4, "test": 4}


def test_many_classes_are_described_in_one_short_line(tmp_path):
    for k in range(30):
        draw(tmp_path / f"class{k:02}", 2 + (k > 0))
    line = describe_set(read(tmp_path))[0]
    assert line.startswith("30 classes (train/validation/test images): class00 1/1/0, ")
    assert line.endswith("and 10 more, fewest images: class00 2")


def test_following_the_advice_of_too_few_per_class_ends_the_error(tmp_path):
    for name, count in (("cat", 60), ("dog", 60), ("rare", 2)):
        draw(tmp_path / name, count)
    config = TrainConfig(name="x", data=DataConfig(uri=str(tmp_path)), model=ModelDefinition(architecture="simple_cnn"))
    with pytest.raises(ConfigError, match=r"data\.labels") as refused:
        raise_errors(check_config(config, read_labelled_set(config.data)), ())
    assert "--data-labels cat,dog" in str(refused.value)
    followed = config.model_copy(update={"data": config.data.model_copy(update={"labels": ("cat", "dog")})})
    raise_errors(check_config(followed, read_labelled_set(followed.data)), ())
