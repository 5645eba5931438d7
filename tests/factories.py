"""What several tests build: small models and folders of drawn images."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
from PIL import Image

from cnn_ray.artifact import Artifact
from cnn_ray.config import ModelDefinition
from cnn_ray.images import DecodedImage
from cnn_ray.reader import ImageReader
from cnn_ray.records import RowFailure

LABELS = ("legitimate", "phishing")
SIDE_PX = 32


def publish_small_artifact(
    models_uri: str, name: str = "small", seed: int = 0, augmentation: Literal["none", "screenshot"] = "none"
) -> Artifact:
    """A published `simple_cnn` of 32 px with random weights: quick to make; its scores differ from image to image."""
    from cnn_ray.export import publish_artifact
    from cnn_ray.model import build_classifier

    definition = ModelDefinition(architecture="simple_cnn", input_size_px=SIDE_PX, augmentation=augmentation)
    model = build_classifier(definition, len(LABELS), seed=seed)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    return publish_artifact(
        model,
        models_uri=models_uri,
        name=name,
        definition=definition,
        labels=LABELS,
        positive_label="phishing",
        threshold=0.5,
        validation_pixels=pixels,
        validation_labels=np.arange(16) % 2,
        training={},
    )


def image_bytes(seed: int, size_px: tuple[int, int] = (40, 30), format: str = "PNG") -> bytes:
    """An encoded image of coloured noise blocks, the same for the same seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blocks).resize(size_px, Image.Resampling.NEAREST).save(stream, format)
    return stream.getvalue()


def write_images(folder: Path, count: int, bad: int = 0) -> Path:
    """A folder of `count` images, and `bad` files more that are none."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        (folder / f"shot-{seed:04d}.png").write_bytes(image_bytes(seed))
    for number in range(bad):
        (folder / f"bad-{number:04d}.png").write_bytes([b"", b"no image at all", image_bytes(0)[:60]][number % 3])
    return folder


def write_flowers102(folder: Path, classes: int = 3, per_class: tuple[int, int, int] = (2, 1, 3)) -> Path:
    """A miniature of Oxford 102 Flowers in its archive layout: images of coloured blocks, labels from 1."""
    from scipy.io import savemat

    (folder / "jpg").mkdir(parents=True)
    labels: list[int] = []
    sides: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
    for label in range(1, classes + 1):
        for side, count in zip(sides, per_class, strict=True):
            for _ in range(count):
                labels.append(label)
                number = len(labels)
                sides[side].append(number)
                blocks = np.random.default_rng(number).integers(0, 150, (6, 8, 3))
                blocks[:, :, label % 3] += 100
                image = Image.fromarray(blocks.astype(np.uint8)).resize((64, 48), Image.Resampling.NEAREST)
                image.save(folder / "jpg" / f"image_{number:05}.jpg", quality=90)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(folder / "setid.mat", {side: np.array([numbers], np.uint16) for side, numbers in sides.items()})
    return folder


def write_packed_cifar10(path: Path, train: int, test: int) -> Path:
    """An .npz of encoded 32x32 images of two classes, cats warm and dogs cold, in the layout that data.uri takes."""
    encoded: list[bytes] = []
    for k in range(train + test):
        pixels = np.random.default_rng(k).integers(0, 150, (32, 32, 3))
        pixels[:, :, 2 * (k % 2)] += 90
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
        encoded.append(stream.getvalue())
    np.savez(
        path,
        data=np.frombuffer(b"".join(encoded), np.uint8),
        offsets=np.cumsum([0, *map(len, encoded)]),
        labels=np.arange(train + test) % 2,
        is_test=np.arange(train + test) >= train,
        class_names=np.array(["cat", "dog"]),
    )
    return path


def load_pixels(root_uri: str, uris: Sequence[str], size_px: tuple[int, int]) -> SimpleNamespace:
    """The images that can be read: pixels uint8 [K, H, W, 3], kept (their positions), failures (code -> count)."""
    reader = ImageReader(root_uri)
    images = [reader.read(uri, size_px) for uri in uris]
    kept = [k for k, image in enumerate(images) if isinstance(image, DecodedImage)]
    pixels = np.stack([images[k].pixels for k in kept]) if kept else np.zeros((0, *size_px, 3), np.uint8)
    failures = Counter(image.code for image in images if isinstance(image, RowFailure))
    return SimpleNamespace(pixels=pixels, kept=np.array(kept), failures=dict(failures))
