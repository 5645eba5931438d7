"""CPU ms per image of decoding to 224x224, by kind of file: ours, OpenCV and Pillow plain.

    python tests/bench/decode.py [FOLDER ...]

One thread, CPU time of the thread, contestants in turns on each file, median over the turns, mean over the files. Then
where our time goes: the walk over the container, inflating, decoding what is left, resizing, and the rest.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from cnn_ray import drawing, image_files, images
from cnn_ray.images import DecodedImage, ImageCaps, decode
from cnn_ray.memory import keep_freed_memory

SIZE = (224, 224)
TURNS = 9
MOST_FILES = 12
Contestant = Callable[[bytes], object]


def main(folders: list[str]) -> None:
    """Prints both tables."""
    keep_freed_memory()  # as decoder processes do; all contestants gain by it
    contestants: dict[str, Contestant] = {"ours": lambda data: decode(data, SIZE, ImageCaps()), "pillow": by_pillow}
    opencv = by_opencv()
    if opencv:
        contestants["cv2"] = opencv
    print(f"{'kind':22}{'files':>6}" + "".join(f"{n:>9}" for n in [*contestants, *PARTS]))
    for kind, files in sorted(gather(folders).items()):
        whole = measure(files, contestants)
        print(f"{kind:22}{len(files):6}" + "".join(f"{ms:9.2f}" for ms in [*whole.values(), *parts(files)]))


def gather(folders: list[str]) -> dict[str, list[bytes]]:
    """Kind -> files: drawn pages of 1366x768, and what we accept from the folders, at most MOST_FILES of a kind."""
    kinds: dict[str, list[bytes]] = {}
    for seed in range(4):
        page = drawing.draw_screenshot(drawing.LABELS[seed % 2], seed, width_px=1366, height_px=768)
        for format in ("PNG", "JPEG"):
            kinds.setdefault(f"drawn {format}", []).append(drawing.encode(page, format, seed))
    for path in sorted(p for folder in folders for p in Path(folder).rglob("*") if p.is_file()):
        data = path.read_bytes()
        if isinstance(decode(data, SIZE, ImageCaps()), DecodedImage):
            with Image.open(io.BytesIO(data)) as image:
                kinds.setdefault(f"real {image.format} {image.mode}", []).append(data)
    for kind, files in kinds.items():
        files.sort(key=len)
        kinds[kind] = files[:: -(-len(files) // MOST_FILES)]
    return kinds


def measure(files: list[bytes], contestants: Mapping[str, Contestant]) -> dict[str, float]:
    """Contestant -> CPU ms per image."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for data in files:
        turns: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(TURNS):
            for name, contestant in contestants.items():
                started = time.thread_time()
                contestant(data)
                turns[name].append(time.thread_time() - started)
        for name, taken in turns.items():
            times[name].append(statistics.median(taken))
    return {name: 1000 * statistics.mean(taken) for name, taken in times.items()}


def by_pillow(data: bytes) -> object:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize(SIZE, Image.Resampling.BOX))


def by_opencv() -> Contestant | None:
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)

    def contestant(data: bytes) -> object:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        return cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA)

    return contestant


PARTS = ("walk", "inflate", "resize")


def parts(files: list[bytes]) -> list[float]:
    """CPU ms of our own parts, in the order of PARTS; what `ours` takes beyond them is the codec."""
    sums = [0.0] * len(PARTS)
    for data in files:
        source = image_files.read(data)
        with Image.open(io.BytesIO(source.clean)) as image:
            if source.format == "JPEG":
                image.draft(None, (SIZE[1] * 3 // 2, SIZE[0] * 3 // 2))
            flat = image.convert("L" if image.mode == "L" else "RGB")
        steps: dict[str, Contestant] = {
            "walk": image_files.read,
            "inflate": lambda _, s=source: image_files.png_stored(s) if s.format == "PNG" else None,
            "resize": lambda _, f=flat: images._resize(np.asarray(f), SIZE, f.size),
        }
        taken = measure([data], steps)
        sums = [s + taken[name] for s, name in zip(sums, PARTS, strict=True)]
    return [s / len(files) for s in sums]


if __name__ == "__main__":
    main(sys.argv[1:])
