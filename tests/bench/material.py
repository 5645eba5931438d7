"""What all contestants work on: one folder of images that each of them can read, and one published model."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cnn_ray import drawing
from cnn_ray.config import ModelDefinition
from cnn_ray.images import DecodedImage, ImageCaps, decode

LABELS = ("legitimate", "phishing")
REFERENCE = "bench@1"
PAGE_PX = (1366, 768)
JPEG_EVERY = 10
USUAL_SHARD = 256
"""What automatic shards grow to."""
MAX_DRAWN = 240
"""More different pages take minutes to draw; copies of them are as much work to score."""


@dataclass(frozen=True)
class Material:
    """Everything a contestant's process needs, as JSON on its command line."""

    images: str
    models: str
    architecture: str
    size_px: int
    count: int
    shard_size: int
    batch_size: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Material:
        return Material(**json.loads(text))

    @property
    def servable(self) -> Path:
        """Folder of the published version."""
        return Path(self.models) / REFERENCE.replace("@", "/")

    @property
    def keras(self) -> Path:
        """The same model for the rivals that predict with Keras."""
        return Path(self.models) / "rival.keras"

    @property
    def ahead(self) -> int:
        """Images that `floor` and `opencv_floor` decode ahead: as many as the local runner."""
        from cnn_ray.runners import SHARDS_AHEAD

        return SHARDS_AHEAD * (self.shard_size or USUAL_SHARD)

    @property
    def settled(self) -> int:
        """From this many scored images on a rate counts as steady."""
        return max(self.count // 10, 64 if self.count > 200 else 1)

    def for_rivals(self) -> str:
        """What a rival gets as JSON on its command line: files, never code of ours."""
        given = {name: getattr(self, name) for name in ("images", "size_px", "count", "batch_size", "ahead")}
        paths = {"ir": str(self.servable / "openvino" / "model.xml"), "keras": str(self.keras)}
        return json.dumps({**given, **paths})

    @property
    def definition(self) -> ModelDefinition:
        return ModelDefinition(architecture=self.architecture, input_size_px=self.size_px)


def gather_images(sources: Sequence[Path], target: Path, count: int) -> str:
    """One line about the `count` images that now lie in `target`, under numbers in an order that no size follows.

    Each file of the sources is there as often as any other (give or take one); without sources pages are drawn.
    """
    good = _readable(sources) if sources else _draw(target.parent / "drawn", min(count, MAX_DRAWN))
    if not good:
        raise SystemExit(f"Expected RGB PNG or JPEG images in {_names(sources)}. Received: none.")
    target.mkdir()
    sizes = []
    for number in range(count):
        path = good[number % len(good)]
        name = target / f"{number:06d}{path.suffix.lower()}"
        shutil.copyfile(path, name)  # hard links would share one time of reading
        with Image.open(path) as image:
            sizes.append((path.stat().st_size / 1e3, image.width * image.height / 1e6, image.format == "PNG"))
    size, pixels, png = np.mean(sizes, axis=0)
    what = f"real files of {_names(sources)}" if sources else f"drawn pages of {PAGE_PX[0]}x{PAGE_PX[1]}"
    different = min(len(good), count)
    return f"{count} images: {different} {what}, mean {size:.0f} kB and {pixels:.2f} megapixels, {png:.0%} PNG"


def _names(sources: Sequence[Path]) -> str:
    return ", ".join(f"{source.name}/" for source in sources)


def _readable(sources: Sequence[Path]) -> list[Path]:
    files = [p for source in sources for p in sorted(source.rglob("*")) if p.is_file() and all_can_read(p)]
    return sorted(files, key=lambda p: hashlib.sha256(p.name.encode()).digest())


def all_can_read(path: Path) -> bool:
    """Whether every contestant reads the file, and to the same channels: RGB PNG or JPEG that we accept and TensorFlow
    and Ray's read_images (one bad file aborts them) do too."""
    raw = path.read_bytes()
    if not isinstance(decode(raw, (64, 64), ImageCaps()), DecodedImage):
        return False
    with Image.open(io.BytesIO(raw)) as image:
        suffixes = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg")}.get(image.format or "", ())
        return image.mode == "RGB" and not getattr(image, "is_animated", False) and path.suffix.lower() in suffixes


def _draw(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths: list[Path] = []
    for seed in range(count):
        form = "JPEG" if seed % JPEG_EVERY == JPEG_EVERY - 1 else "PNG"
        image = drawing.draw_screenshot(drawing.LABELS[seed % 2], seed, width_px=PAGE_PX[0], height_px=PAGE_PX[1])
        paths.append(folder / f"{seed:06d}{drawing.FORMATS[form]}")
        paths[-1].write_bytes(drawing.encode(image, form, seed))
    return paths


def publish(material: Material, seed: int = 0) -> None:
    """The next version of `bench` lies in the models folder. Random weights take as long as trained ones."""
    from cnn_ray.export import publish_artifact
    from cnn_ray.model import build_classifier

    side = material.size_px
    model = build_classifier(material.definition, len(LABELS), seed=seed)
    publish_artifact(
        model,
        models_uri=material.models,
        name="bench",
        definition=material.definition,
        labels=LABELS,
        positive_label="phishing",
        threshold=0.5,
        validation_pixels=np.random.default_rng(0).integers(0, 256, (8, side, side, 3), dtype=np.uint8),
        validation_labels=np.arange(8) % 2,
        training={},
    )
    model.save(material.keras)


def forget_reads(material: Material) -> None:
    """All images look as if never read, with their times of change as before (an etag holds them)."""
    for path in image_paths(material):
        os.utime(path, ns=(0, path.stat().st_mtime_ns))


def read_times(material: Material) -> list[float]:
    """When each image was first read (seconds since the epoch, sorted): `relatime` keeps that; empty on `noatime`."""
    times = sorted(path.stat().st_atime for path in image_paths(material))
    return times if times and times[0] > 0 else []


def image_paths(material: Material) -> Iterable[Path]:
    """The images in the order of their names."""
    return sorted(Path(material.images).iterdir())
