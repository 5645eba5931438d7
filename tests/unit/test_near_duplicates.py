"""Images that look alike are found, those that only share a layout are not, and whole clusters stay on one side."""

import io

import numpy as np
import pytest
from PIL import Image

from cnn_ray import near_duplicates
from cnn_ray.config import DataConfig
from cnn_ray.dataset import read_labelled_set
from cnn_ray.drawing import draw_screenshot
from cnn_ray.inspection import inspect_images
from cnn_ray.near_duplicates import MAX_DISTANCE, Prints, find_twins, perceptual_hash


def page(seed: int) -> Image.Image:
    return draw_screenshot("legitimate", seed).convert("RGB")


def twins_of(folder, images):
    folder.mkdir(exist_ok=True)
    uris = []
    for k, image in enumerate(images):
        path = folder / f"{k:03}.png"
        image.save(path)
        uris.append(str(path))
    return find_twins(inspect_images(str(folder), uris)[0]).tolist()


def recoded(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def test_recompressed_and_rescaled_captures_are_twins(tmp_path):
    first = page(1)
    smaller = first.resize((first.width * 2 // 3, first.height * 2 // 3), Image.Resampling.LANCZOS)
    assert twins_of(tmp_path, [first, recoded(first, 60), smaller, page(2)]) == [0, 0, 0, 3]


def test_drawn_pages_are_their_own(tmp_path):
    twins = twins_of(tmp_path, [page(seed) for seed in range(60)])
    assert sum(twin != k for k, twin in enumerate(twins)) <= 3, twins


def test_blank_images_are_twins_only_where_they_are_equal(tmp_path):
    blanks = [Image.new("RGB", (40, 40), (level, level, level)) for level in (200, 201, 200)]
    assert twins_of(tmp_path, blanks) == [0, 1, 0]


def test_plain_colours_are_blank_too(tmp_path):
    images = [Image.new("RGB", (40, 40), (level, 0, 120)) for level in (30, 32, 30)]
    assert twins_of(tmp_path, images) == [0, 1, 0]


def test_unreadable_files_are_nobodys_twins(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    prints, failures = inspect_images(str(tmp_path), [str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    assert find_twins(prints).tolist() == [0, 1]
    assert {k: failure.code for k, failure in failures.items()} == {0: "not_an_image", 1: "not_an_image"}


@pytest.mark.parametrize("distance", [0, 1, MAX_DISTANCE, MAX_DISTANCE + 1])
def test_all_pairs_within_the_distance_are_found_and_no_others(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**63, 400, dtype=np.uint64)
    for k in range(0, 400, 2):
        flipped = rng.choice(64, distance, replace=False)
        hashes[k + 1] = hashes[k] ^ np.bitwise_or.reduce(
            np.uint64(1) << flipped.astype(np.uint64), initial=np.uint64(0)
        )
    thumbnails = np.full((400, 16, 16, 3), 90, np.uint8)
    thumbnails[:, ::2] = 10
    twins = find_twins(Prints(hashes, thumbnails, np.ones(400, bool)))
    expected = np.arange(400) // 2 * 2 if distance <= MAX_DISTANCE else np.arange(400)
    np.testing.assert_array_equal(twins, expected)


def test_many_equal_images_and_full_buckets_lose_no_twin(monkeypatch):
    """All agree in six bands; each pair of two is one bit apart and far apart in the list."""
    monkeypatch.setattr(near_duplicates, "MOST_COMPARED", 16)
    thumbnails = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), np.uint8)
    hashes = np.zeros(100, np.uint64)
    hashes[50:] = 1
    twins = find_twins(Prints(hashes, np.concatenate([thumbnails, thumbnails]), np.ones(100, bool)))
    np.testing.assert_array_equal(twins, np.arange(100) % 50)
    blank = np.repeat(np.array([200, 201], np.uint8), 3000)[np.arange(6000) * 7 % 6000]
    pixels = np.broadcast_to(blank[:, None, None, None], (6000, 16, 16, 3))
    twins = find_twins(Prints(np.zeros(6000, np.uint64), pixels, np.ones(6000, bool)))
    assert len(set(twins.tolist())) == 2


def test_the_hash_does_not_see_brightness():
    pixels = np.random.default_rng(0).integers(0, 200, (32, 32, 3), np.uint8)
    assert perceptual_hash(pixels) == perceptual_hash(pixels + 20)


def test_twins_stay_on_one_side_of_a_drawn_split(tmp_path):
    for label, base in (("cat", 0), ("dog", 100)):
        (tmp_path / label).mkdir()
        for k in range(20):
            image = page(base + k)
            image.save(tmp_path / label / f"{k:03}-a.png")
            recoded(image, 70).save(tmp_path / label / f"{k:03}-b.png")
    config = DataConfig(uri=str(tmp_path), validation_fraction=0.3, test_fraction=0.2)
    labelled = read_labelled_set(config)
    sides = {}
    for uri, side in zip(labelled.uris, labelled.splits, strict=True):
        sides.setdefault(uri.rsplit("-", 1)[0], set()).add(int(side))
    assert all(len(found) == 1 for found in sides.values())
    assert {len(labelled.rows(s)) > 0 for s in ("train", "validation", "test")} == {True}
    ignored = read_labelled_set(config.model_copy(update={"near_duplicates": "ignore"}))
    assert ignored.twins is None
    assert ignored.digest() != labelled.digest()
