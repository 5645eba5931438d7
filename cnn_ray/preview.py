"""A sheet of augmented images to look at before a training is paid for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cnn_ray.config import TrainConfig
from cnn_ray.dataset import read_labelled_set, sample_images
from cnn_ray.errors import ConfigError, DataError
from cnn_ray.model import input_size_px

IMAGES = 6
EXAMPLES = 7
CAPTION_PX = 16
GAP_PX = 4
MOST_SIDE_PX = 256


def draw_augmentation(config: TrainConfig, path: str) -> str:
    """The path, where a PNG is now: a row for each of six training images, first as the model sees it, then seven times
    as the configured augmentation changes it.

    Raises:
        ConfigError: augmentation is none, or the path cannot be written.
        DataError: no training image can be read.
    """
    from cnn_ray.augmentation import augmentation_layers

    if config.model.augmentation == "none":
        raise ConfigError(
            "Expected an augmentation to preview. Received: model.augmentation none. "
            "Next: add --model-augmentation screenshot (or photo)."
        )
    images = sample_images(read_labelled_set(config.data), "train", IMAGES, input_size_px(config.model))
    if not images:
        raise DataError(f"Expected readable images. Received: none in {config.data.uri}. Next: check data.uri.")
    layers = augmentation_layers(config.model.augmentation, config.seed, config.model.augmentation_strength)
    rows: list[np.ndarray] = []
    for image in images:
        batch = np.repeat(image.pixels[None], EXAMPLES, axis=0)
        for layer in layers:
            batch = layer(batch, training=True)
        changed = np.clip(np.round(np.asarray(batch)), 0, 255).astype(np.uint8)
        rows.append(np.concatenate([image.pixels[None], changed]))
    sheet = _sheet(rows, f"{config.model.augmentation}, {images[0].pixels.shape[0]} px")
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise ConfigError(
            f"Expected a path that can be written. Received: {path} ({error.strerror}). Next: name another file."
        ) from None
    return str(Path(path))


def _sheet(rows: list[np.ndarray], caption: str) -> Image.Image:
    side = min(rows[0].shape[1], MOST_SIDE_PX)
    step = side + GAP_PX
    sheet = Image.new("RGB", (step * (EXAMPLES + 1), CAPTION_PX + step * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 2), "original", fill="black")
    draw.text((step + 2, 2), f"augmented: {caption}", fill="black")
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            sheet.paste(Image.fromarray(pixels).resize((side, side)), (x * step, CAPTION_PX + y * step))
    return sheet
