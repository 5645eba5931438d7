"""The sheet of examples: what is on it, and one sentence where it cannot be drawn."""

import numpy as np
import pytest
from factories import write_packed_cifar10
from PIL import Image

from cnn_ray.config import DataConfig, ModelDefinition, TrainConfig
from cnn_ray.errors import ConfigError
from cnn_ray.preview import CAPTION_PX, EXAMPLES, GAP_PX, IMAGES, draw_augmentation

pytest.importorskip("keras")
SIDE = 32


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    path = write_packed_cifar10(tmp_path / "packed.npz", train=20, test=2)
    return TrainConfig(
        name="x",
        data=DataConfig(uri=str(path), near_duplicates="ignore"),
        model=ModelDefinition(augmentation="screenshot"),
    )


def with_augmentation(config: TrainConfig, kind: str) -> TrainConfig:
    return config.model_copy(update={"model": ModelDefinition(augmentation=kind)})


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = CAPTION_PX + row * (SIDE + GAP_PX), column * (SIDE + GAP_PX)
    return sheet[top : top + SIDE, left : left + SIDE].astype(int)


@pytest.mark.parametrize("kind", ["photo", "screenshot"])
def test_each_row_has_an_image_and_seven_others_of_it(config, tmp_path, kind):
    path = str(tmp_path / "sheet.png")
    assert draw_augmentation(with_augmentation(config, kind), path) == path
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (CAPTION_PX + IMAGES * (SIDE + GAP_PX), (EXAMPLES + 1) * (SIDE + GAP_PX), 3)
    for row in range(IMAGES):
        cells = [cell(sheet, row, column) for column in range(EXAMPLES + 1)]
        others = [np.abs(cells[0] - other).mean() for other in cells[1:]]
        assert min(others) > 1, "augmented images differ from the original"
        assert len({other.tobytes() for other in cells[1:]}) == EXAMPLES
    assert (sheet[:CAPTION_PX] < 128).any(), "captions"


def test_the_seed_of_the_configuration_decides(config, tmp_path):
    first, again, other = (tmp_path / name for name in ("1.png", "2.png", "3.png"))
    draw_augmentation(config, str(first))
    draw_augmentation(config, str(again))
    draw_augmentation(config.model_copy(update={"seed": 5}), str(other))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_without_augmentation_there_is_nothing_to_draw(config, tmp_path):
    with pytest.raises(ConfigError, match=r"Received: model.augmentation none\. Next: add"):
        draw_augmentation(with_augmentation(config, "none"), str(tmp_path / "sheet.png"))


def test_a_path_that_cannot_be_written_is_named(config, tmp_path):
    with pytest.raises(ConfigError, match=r"Received: .*no/sheet\.png.*Next: name another file"):
        draw_augmentation(config, str(tmp_path / "no" / "sheet.png"))
