"""Data sets as they are distributed: CIFAR-10 (keras.datasets, or an .npz of encoded images) and Oxford 102 Flowers.

Their test part is the split `test`; validation is cut from the training part, so that nothing is tuned on the test set.
"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnn_ray.errors import DataError, NotFoundError
from cnn_ray.node_files import local_copy
from cnn_ray.storage import open_store
from cnn_ray.user_folders import home_folder

KERAS_CIFAR10 = "keras.datasets.cifar10"
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NPZ_KEYS = ("data", "offsets", "labels", "is_test", "class_names")
FLOWERS_FILES = ("imagelabels.mat", "setid.mat")
FLOWERS_SPLITS = {"trnid": "train", "valid": "validation", "tstid": "test"}


@dataclass(frozen=True)
class KnownRows:
    """Labelled images of a known set: location, class name and side of each."""

    root_uri: str
    uris: list[str]
    names: list[str]
    splits: list[str]


def is_packed(uri: str) -> bool:
    """Whether the uri names an image inside a packed set: `FILE.npz#00017`, `keras.datasets.cifar10#00017`."""
    return re.fullmatch(r"(.+\.npz|keras\.datasets\.cifar10)#\d+", uri) is not None


def read_packed(uri: str) -> bytes:
    """The encoded image behind the uri of a packed set.

    Raises:
        DataError: the set cannot be had.
        NotFoundError: it has no such image.
    """
    container, _, number = uri.rpartition("#")
    try:
        if container == KERAS_CIFAR10:
            return _encode(_keras_cifar10()[0][int(number)])
        packed = _packed(container)
        return packed.data[packed.offsets[int(number)] : packed.offsets[int(number) + 1]]
    except IndexError:
        raise NotFoundError(f"Expected an image of {container}. Received: {uri}. Next: correct it.") from None


def cifar10_rows(uri: str) -> KnownRows:
    """CIFAR-10 (Krizhevsky 2009): uri is keras.datasets.cifar10, or an .npz with data, offsets, labels, is_test and
    class_names (image k is the bytes data[offsets[k] : offsets[k + 1]]).

    Raises:
        DataError: no network for Keras, or the file is not such a set.
    """
    if uri == KERAS_CIFAR10:
        _, labels, is_test = _keras_cifar10()
        names = CIFAR10_NAMES
    else:
        packed = _packed(uri)
        labels, is_test, names = packed.labels, packed.is_test, packed.class_names
    return KnownRows(
        root_uri=uri,
        uris=[f"{uri}#{k:05}" for k in range(len(labels))],
        names=[names[label] for label in labels],
        splits=["test" if test else "train" for test in is_test],
    )


def flowers102_rows(uri: str) -> KnownRows:
    """Oxford 102 Flowers (Nilsback and Zisserman 2008) in its archive layout: jpg/, imagelabels.mat, setid.mat.

    The official split is kept. The archive holds no names of the classes: they are class_001 to class_102.

    Raises:
        DataError: a file is missing or is not what its name says.
    """
    from scipy.io import loadmat

    store = open_store(uri)
    loaded: dict[str, Any] = {}
    for name in FLOWERS_FILES:
        try:
            loaded |= loadmat(io.BytesIO(store.get(name)))
        except NotFoundError:
            raise DataError(
                f"Expected jpg/, imagelabels.mat and setid.mat in {uri}. Received: no {name}. "
                "Next: unpack all three downloads of Oxford 102 Flowers into one folder."
            ) from None
        except (ValueError, TypeError, NotImplementedError, EOFError) as error:
            reason = " ".join(str(error).split())[:160]
            raise DataError(f"Expected a MATLAB file. Received: {name} ({reason}). Next: download it again.") from None
    missing = {"labels", *FLOWERS_SPLITS} - loaded.keys()
    if missing:
        raise DataError(
            f"Expected labels, trnid, valid and tstid in {uri}. Received: no {sorted(missing)[0]}. "
            "Next: download imagelabels.mat and setid.mat again."
        )
    labels = np.ravel(loaded["labels"]).astype(int)
    sides = {int(k): side for key, side in FLOWERS_SPLITS.items() for k in np.ravel(loaded[key])}
    numbers = [k for k in sorted(sides) if 1 <= k <= len(labels)]
    return KnownRows(
        root_uri=store.uri,
        uris=[f"{store.uri}/jpg/image_{k:05}.jpg" for k in numbers],
        names=[f"class_{labels[k - 1]:03}" for k in numbers],
        splits=[sides[k] for k in numbers],
    )


@dataclass(frozen=True)
class _Packed:
    data: bytes
    offsets: np.ndarray
    labels: np.ndarray
    is_test: np.ndarray
    class_names: tuple[str, ...]


@functools.lru_cache(maxsize=2)
def _packed(uri: str) -> _Packed:
    """The set in memory, once per process; never unpickled."""
    try:
        with np.load(local_copy(uri), allow_pickle=False) as arrays:
            missing = [key for key in NPZ_KEYS if key not in arrays.files]
            if missing:
                raise DataError(
                    f"Expected {', '.join(NPZ_KEYS)} in {uri}. Received: no {missing[0]}. Next: see README, Train."
                )
            return _Packed(
                arrays["data"].tobytes(),
                arrays["offsets"],
                arrays["labels"].astype(int),
                arrays["is_test"].astype(bool),
                tuple(str(name) for name in arrays["class_names"]),
            )
    except NotFoundError:
        raise DataError(
            f"Expected an .npz of encoded images. Received: no file {uri}. Next: correct data.uri."
        ) from None
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"Expected an .npz of encoded images. Received: {uri} ({reason}). Next: correct data.uri."
        ) from None


@functools.lru_cache(maxsize=1)
def _keras_cifar10() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixels uint8 [60000, 32, 32, 3], labels, is_test); downloaded by Keras into ~/.keras once."""
    import keras

    try:
        (train, train_labels), (test, test_labels) = keras.datasets.cifar10.load_data()
    except Exception as error:  # noqa: BLE001 - Keras wraps every download failure in a bare Exception
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"Expected to download CIFAR-10 through keras.datasets. Received: {reason}. "
            f"Next: run with network once, put cifar-10-batches-py into {home_folder() / '.keras' / 'datasets'}, "
            "or give an .npz of encoded images as data.uri."
        ) from None
    pixels = np.concatenate([train, test])
    labels = np.concatenate([train_labels, test_labels]).ravel().astype(int)
    return pixels, labels, np.arange(len(labels)) >= len(train)


def _encode(pixels: np.ndarray) -> bytes:
    """As PNG, so that one decoder reads everything."""
    import cv2

    return cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes()
