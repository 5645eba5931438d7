"""The drawn screenshots: same seed same bytes, no cheap clue to the label, and hostile files as promised."""

import collections
import csv
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from cnn_ray import drawing, drawn_files
from cnn_ray.errors import ConfigError, DataError
from cnn_ray.records import QuarantineCode

PIL_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("label", drawing.LABELS)
@pytest.mark.parametrize("format", drawing.FORMATS)
def test_same_seed_same_bytes(label, format):
    first, again, other = (drawing.encode(drawing.draw_screenshot(label, seed), format, seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_labels_share_size_and_differ_in_content():
    legitimate, phishing = (drawing.draw_screenshot(label, 3) for label in drawing.LABELS)
    assert legitimate.size == phishing.size
    assert legitimate.mode == phishing.mode == "RGB"
    assert legitimate.tobytes() != phishing.tobytes()


@pytest.mark.parametrize("size", [(160, 160), (200, 900), (900, 200), (1366, 768)])
@pytest.mark.parametrize("label", drawing.LABELS)
def test_any_size_can_be_drawn(label, size):
    for seed in range(8):
        assert drawing.draw_screenshot(label, seed, width_px=size[0], height_px=size[1]).size == size


def test_unknown_label_and_format_are_refused():
    with pytest.raises(ConfigError, match="Received: 'benign'"):
        drawing.draw_screenshot("benign", 1)
    with pytest.raises(ConfigError, match="160 px or more"):
        drawing.draw_screenshot("phishing", 1, width_px=100)
    with pytest.raises(ConfigError, match="Received: 'BMP'"):
        drawing.encode(Image.new("RGB", (8, 8)), "BMP", 1)


def test_labelled_folder_is_balanced_and_mixed(tmp_path):
    calls = []
    folder = drawn_files.write_labelled(tmp_path / "new" / "set", 24, 1, progress=calls.append)
    assert folder == tmp_path / "new" / "set"
    assert calls == list(range(1, 25))
    assert sorted(path.name for path in folder.iterdir()) == sorted(drawing.LABELS)
    for label in drawing.LABELS:
        files = list((folder / label).iterdir())
        assert collections.Counter(path.suffix for path in files) == {".png": 4, ".jpg": 4, ".webp": 4}
        for path in files:
            with Image.open(path) as image:
                assert image.format == PIL_FORMATS[path.suffix]
    assert len({Image.open(path).size for path in folder.rglob("*.*")}) > 3


class Stop(Exception):
    pass


def stop_at(number):
    def progress(done):
        if done == number:
            raise Stop

    return progress


@pytest.mark.parametrize("write", [drawn_files.write_labelled, drawn_files.write_unlabelled])
def test_second_call_completes_an_interrupted_folder(tmp_path, write):
    whole = contents(write(tmp_path / "a" / "set", 10, 4).parent)
    with pytest.raises(Stop):
        write(tmp_path / "b" / "set", 10, 4, progress=stop_at(3))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "b" / "set").rglob("*.*")}
    assert len(kept) == 3
    write(tmp_path / "b" / "set", 10, 4)
    assert contents(tmp_path / "b") == whole
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in kept.items())


def test_interrupted_write_leaves_no_partial_file(tmp_path, monkeypatch):
    def interrupt(path, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        drawn_files.write_labelled(tmp_path, 2, 1)
    assert contents(tmp_path) == {}


def test_unlabelled_folder_has_its_truth_outside(tmp_path):
    folder = drawn_files.write_unlabelled(tmp_path / "night", 12, 2)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "night-truth.csv").read_text())))
    assert [row["file"] for row in rows] == sorted(path.name for path in folder.iterdir())
    assert collections.Counter(row["label"] for row in rows) == {"legitimate": 6, "phishing": 6}
    drawn_files.write_unlabelled(folder, 6, 2)  # fewer than there are: nothing is lost
    assert len((tmp_path / "night-truth.csv").read_text().splitlines()) == 13


def test_unlabelled_folder_of_another_seed_is_refused(tmp_path):
    drawn_files.write_unlabelled(tmp_path / "night", 12, 2)
    before = contents(tmp_path)
    with pytest.raises(DataError, match="of this seed"):
        drawn_files.write_unlabelled(tmp_path / "night", 12, 3)
    assert contents(tmp_path) == before


def features(label, seed):
    image = drawing.draw_screenshot(label, seed)
    format = list(drawing.FORMATS)[seed % 3]
    size = len(drawing.encode(image, format, seed))
    colour = np.asarray(image.reduce(4)).mean((0, 1))
    return [*colour, *image.size, np.log(size), size / image.width / image.height, seed % 3 == 0, seed % 3 == 1]


def linear_accuracy(values, targets, train):
    """Held-out accuracy of logistic regression by plain gradient descent."""
    values = (values - values[:train].mean(0)) / (values[:train].std(0) + 1e-9)
    values = np.c_[values, np.ones(len(values))]
    weights = np.zeros(values.shape[1])
    for _ in range(1500):
        chance = 1 / (1 + np.exp(-values[:train] @ weights))
        weights -= 0.5 * values[:train].T @ (chance - targets[:train]) / train
    return float(((values[train:] @ weights > 0) == targets[train:]).mean())


def test_colour_and_size_do_not_give_the_label_away():
    pairs = [(features(label, seed), label == "phishing") for seed in range(130) for label in drawing.LABELS]
    values, targets = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    assert linear_accuracy(values[:, :5], targets, 160) < 0.7
    assert linear_accuracy(values, targets, 160) < 0.75  # file size and format as well


@pytest.fixture(scope="module")
def hostile():
    return drawn_files.hostile_files()


def opened(hostile, name):
    return Image.open(io.BytesIO(hostile[name]))


def test_expected_codes_are_of_the_closed_list(hostile):
    assert set(drawn_files.EXPECTED_QUARANTINE) < set(hostile)
    assert {QuarantineCode(code) for code in drawn_files.EXPECTED_QUARANTINE.values()}
    assert hostile == drawn_files.hostile_files()


def test_bomb_is_a_valid_huge_header_in_a_small_file(hostile):
    start = time.perf_counter()
    bomb = drawn_files._bomb(20_000)
    assert time.perf_counter() - start < 1
    assert bomb == hostile["bomb.png"]
    assert struct.unpack(">II", bomb[16:24]) == (20_000, 20_000)
    assert len(bomb) < 2_000_000


def test_small_bomb_decodes_so_the_stream_is_sound():
    small = drawn_files._bomb(300)
    with Image.open(io.BytesIO(small)) as image:
        assert image.size == (300, 300)
        assert image.getextrema() == ((0, 0), (0, 0), (0, 0))
    length = struct.unpack(">I", small[33:37])[0]
    assert zlib.decompress(small[41 : 41 + length]) == bytes(300 * 901)  # checks Adler-32


def test_files_that_cannot_be_scored(hostile):
    assert hostile["empty.png"] == b""
    assert opened(hostile, "icon.png").format == "ICO"
    for name in ("text.png", "error-page.jpg"):
        with pytest.raises(OSError, match="cannot identify"):
            opened(hostile, name)
    for name in ("cut-off.png", "cut-off.jpg"):
        with pytest.raises(OSError, match="truncated"):
            opened(hostile, name).load()


def test_files_that_are_odd_but_good(hostile):
    modes = {name: opened(hostile, name).mode for name in set(hostile) - set(drawn_files.EXPECTED_QUARANTINE)}
    assert modes == {"cmyk.jpg": "CMYK", "sixteen-bit.png": "I;16", "palette.png": "P", "animated.gif": "P"}
    assert opened(hostile, "animated.gif").n_frames == 2
    assert opened(hostile, "sixteen-bit.png").getextrema()[1] > 255
    for name in modes:
        opened(hostile, name).load()
