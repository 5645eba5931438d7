"""CIFAR-10 and Oxford 102 Flowers as they are distributed, on generated miniatures."""

import io
import sys

import numpy as np
import pytest
from factories import load_pixels, write_flowers102, write_packed_cifar10
from PIL import Image

from cnn_ray import known_sets
from cnn_ray.config import DataConfig
from cnn_ray.dataset import read_labelled_set, write_split
from cnn_ray.errors import DataError
from cnn_ray.storage import open_store


def test_flowers_keep_the_official_split_and_labels(tmp_path):
    labelled = read_labelled_set(DataConfig(uri=str(write_flowers102(tmp_path / "flowers"))))
    assert labelled.labels == ("class_001", "class_002", "class_003")
    assert [len(labelled.rows(side)) for side in ("train", "validation", "test")] == [6, 3, 9]
    first = labelled.uris.index(str(tmp_path / "flowers" / "jpg" / "image_00001.jpg"))
    assert labelled.label_ids[first] == 0
    pixels = load_pixels(labelled.root_uri, labelled.uris, (20, 20)).pixels
    assert pixels.shape == (18, 20, 20, 3)


@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
def test_flowers_without_a_file_are_refused_in_one_sentence(tmp_path, name):
    root = write_flowers102(tmp_path / "flowers")
    (root / name).unlink()
    with pytest.raises(DataError, match=rf"Received: no {name}.*Next:"):
        read_labelled_set(DataConfig(uri=str(root), format="flowers102"))


def test_flowers_that_are_no_matlab_files_are_refused(tmp_path):
    root = write_flowers102(tmp_path / "flowers")
    (root / "setid.mat").write_bytes(b"<html>not found</html>" * 20)
    with pytest.raises(DataError, match="Expected a MATLAB file"):
        read_labelled_set(DataConfig(uri=str(root)))


@pytest.mark.parametrize("where", ["local", "s3"])
def test_packed_cifar10_has_its_test_part_and_cuts_validation_from_training(tmp_path, request, monkeypatch, where):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = str(write_packed_cifar10(tmp_path / "cifar.npz", 60, 20))
    if where == "s3":
        root = request.getfixturevalue("s3_uri")
        open_store(root).put("cifar.npz", (tmp_path / "cifar.npz").read_bytes())
        uri = f"{root}/cifar.npz"
    labelled = read_labelled_set(DataConfig(uri=uri))
    assert labelled.labels == ("cat", "dog")
    assert [len(labelled.rows(side)) for side in ("train", "validation", "test")] == [48, 12, 20]
    loaded = load_pixels(labelled.root_uri, labelled.uris, (32, 32))
    assert len(loaded.kept) == 80
    again = known_sets.read_packed(labelled.uris[7])
    assert again.startswith(b"\x89PNG")


def test_a_written_split_makes_the_same_set_again(tmp_path):
    uri = str(write_packed_cifar10(tmp_path / "cifar.npz", 60, 20))
    labelled = read_labelled_set(DataConfig(uri=uri, split_seed=3))
    (tmp_path / "split.parquet").write_bytes(write_split(labelled))
    again = read_labelled_set(DataConfig(uri=str(tmp_path / "split.parquet"), split_column="split"))
    assert again.digest() == labelled.digest()
    assert len(load_pixels(again.root_uri, again.uris, (8, 8)).kept) == 80


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_split_written_into_another_folder_names_the_same_images(tmp_path, request, where):
    root = str(tmp_path / "data") if where == "local" else request.getfixturevalue("s3_uri")
    store, rows = open_store(root), ["uri,label,brand,origin"]
    for k in range(24):
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (9, 9, 3), np.uint8)).save(stream, "PNG")
        store.put(f"{k:02}.png", stream.getvalue())
        rows.append(f"{k:02}.png,{'ab'[k % 2]},brand{k // 2},{'xy'[k % 3 == 0]}")
    store.put("m.csv", "\n".join(rows).encode())
    config = DataConfig(uri=f"{store.uri}/m.csv", group_column="brand", source_column="origin", test_fraction=0.2)
    labelled = read_labelled_set(config)
    run = tmp_path / "runs" / "r" / "split.parquet"
    run.parent.mkdir(parents=True)
    run.write_bytes(write_split(labelled))
    named = {"split_column": "split", "group_column": "group", "source_column": "source"}
    again = read_labelled_set(DataConfig(uri=str(run), **named))
    assert again.digest() == labelled.digest()
    assert (again.uris, again.groups, again.sources) == (labelled.uris, labelled.groups, labelled.sources)
    assert len(load_pixels(again.root_uri, again.uris, (8, 8)).kept) == 24


def test_pickled_arrays_are_never_loaded(tmp_path):
    class Danger:
        def __reduce__(self):
            return (sys.exit, (9,))

    keys = {key: np.zeros(2) for key in known_sets.NPZ_KEYS}
    np.savez(tmp_path / "evil.npz", **(keys | {"class_names": np.array([Danger(), "b"], object)}))
    with pytest.raises(DataError, match=r"Expected an \.npz of encoded images"):
        read_labelled_set(DataConfig(uri=str(tmp_path / "evil.npz")))


def test_a_file_that_lacks_a_key_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", data=np.zeros(3, np.uint8))
    with pytest.raises(DataError, match="Received: no offsets"):
        read_labelled_set(DataConfig(uri=str(tmp_path / "x.npz")))


def test_keras_datasets_without_network_is_one_sentence(monkeypatch):
    keras = pytest.importorskip("keras")

    def fail():
        raise Exception("URL fetch failure on https://example.org: None -- Name or service not known")

    known_sets._keras_cifar10.cache_clear()
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", fail)
    with pytest.raises(DataError, match=r"Expected to download CIFAR-10.*Next: run with network once"):
        read_labelled_set(DataConfig(uri="keras.datasets.cifar10"))


def test_keras_datasets_are_read_by_the_same_decoder(monkeypatch):
    keras = pytest.importorskip("keras")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    labels = (np.arange(60) % 10)[:, None].astype(np.uint8)
    monkeypatch.setattr(
        keras.datasets.cifar10, "load_data", lambda: ((pixels[:40], labels[:40]), (pixels[40:], labels[40:]))
    )
    known_sets._keras_cifar10.cache_clear()
    try:
        labelled = read_labelled_set(DataConfig(uri="keras.datasets.cifar10"))
        assert labelled.labels == known_sets.CIFAR10_NAMES
        assert len(labelled.rows("test")) == 20
        loaded = load_pixels(labelled.root_uri, labelled.uris, (32, 32))
        np.testing.assert_array_equal(loaded.pixels, pixels)
    finally:
        known_sets._keras_cifar10.cache_clear()
