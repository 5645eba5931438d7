"""`floor`: what the hardware gives with our own decoder and predictor and nothing else, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from material import REFERENCE, Material, image_paths
from rivals import bare


def floor(material: Material) -> dict[str, Any]:
    """Decode threads that run as far ahead as the local runner's, and the predictor that the runners load."""
    from cnn_ray.artifact import load_artifact
    from cnn_ray.images import DecodedImage, ImageCaps, decode
    from cnn_ray.predictor import cpu_count, load_predictor

    caps = ImageCaps()
    size_px = (material.size_px, material.size_px)

    def read(path: Path) -> np.ndarray:
        image = decode(path.read_bytes(), size_px, caps)
        if not isinstance(image, DecodedImage):
            raise TypeError(f"{path}: {image}")
        return image.pixels

    def load() -> bare.Predict:
        artifact = load_artifact(material.models, REFERENCE)
        return load_predictor(artifact, engine="openvino", precision="f32").predict

    return bare.run(
        list(image_paths(material)),
        read,
        load,
        threads=cpu_count(),
        ahead=material.ahead,
        batch_size=material.batch_size,
    )
