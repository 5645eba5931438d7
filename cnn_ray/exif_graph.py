"""The EXIF orientation of a JPEG in plain TensorFlow, for the exported graph: TensorFlow Serving has none of our code.

The rules are those of `image_files.exif_orientation`, and what makes no sense is orientation 1, never an error. Only
JPEG: the eXIf chunk of a PNG and the EXIF chunk of a WebP, which the endpoint obeys, are not read here.
"""

from __future__ import annotations

from typing import Any

from cnn_ray.images import TURNS

_MAX_TURNS = 256
"""Segments, or pieces of stray bytes, that are looked at before the first scan; cameras write about ten."""
_PIECE = 256
"""Bytes in which the next marker is looked for. It nearly always comes first."""


def jpeg_orientation(encoded: Any) -> Any:
    """Return the orientation 1-8, int32 [], of an encoded image, string []: that of its last EXIF segment before the
    first scan; 1 for what is no JPEG."""
    import tensorflow as tf

    size = tf.cast(tf.strings.length(encoded), tf.int64)
    is_jpeg = tf.equal(tf.strings.substr(encoded, 0, 3), b"\xff\xd8\xff")

    def step(position: Any, orientation: Any, _: Any) -> tuple[Any, Any, Any]:
        ahead, marker = _next_marker(_octets(encoded, position, _PIECE))
        start = position + ahead
        length = _number(_octets(encoded, start + 2, 2), False)
        after = start + 2 + length
        whole = (marker >= 0) & (start + 4 <= size) & (after <= size)
        body = tf.minimum(start + 4, size)
        is_exif = whole & tf.equal(marker, 0xE1) & tf.equal(tf.strings.substr(encoded, body, 6), b"Exif\0\0")
        orientation = tf.cond(
            is_exif & (length >= 8),
            lambda: _tiff_orientation(
                tf.strings.substr(encoded, tf.minimum(body + 6, size), tf.maximum(length - 8, 0))
            ),
            lambda: orientation,
        )
        last = tf.reduce_any(tf.equal(marker, [0xDA, 0xD8, 0xD9, 0x01]))
        stray = (marker < 0) & (start + 1 < size)
        return tf.where(stray, start, after), orientation, stray | (whole & ~last)

    _, orientation, _ = tf.while_loop(
        lambda _position, _orientation, more: more,
        step,
        (tf.constant(2, tf.int64), tf.constant(1, tf.int32), is_jpeg),
        maximum_iterations=_MAX_TURNS,
    )
    return orientation


def resized_upright(image: Any, orientation: Any, size_px: tuple[int, int]) -> Any:
    """Return uint8 [H, W, 3] of `size_px` (height, width): the mean of areas, then turned as `images.decode` does."""
    import tensorflow as tf

    height, width = size_px
    turn = tf.constant([TURNS[k] for k in range(1, 9)])[orientation - 1]
    swap, flip_rows, flip_columns = turn[0], turn[1], turn[2]
    target = tf.where(swap, [width, height], [height, width])
    pixels = tf.cast(tf.round(tf.image.resize(image, target, method="area")), tf.uint8)
    pixels = tf.cond(swap, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)
    pixels = tf.cond(flip_rows, lambda: tf.reverse(pixels, [0]), lambda: pixels)
    pixels = tf.cond(flip_columns, lambda: tf.reverse(pixels, [1]), lambda: pixels)
    return tf.ensure_shape(pixels, (height, width, 3))


def _next_marker(octets: Any) -> tuple[Any, Any]:
    """Return how far ahead the next marker is, int64 [], and its code, int64 []. Without one the code is -1, and the
    distance is up to the last byte, which may be the first half of a marker."""
    import tensorflow as tf

    codes = octets[1:]
    restart = (codes >= 0xD0) & (codes <= 0xD7)
    found = tf.where(tf.equal(octets[:-1], 0xFF) & (codes > 0) & (codes < 0xFF) & ~restart)[:, 0]
    count = tf.size(codes, out_type=tf.int64)
    ahead = tf.reduce_min(tf.concat([found, [count]], 0))
    return ahead, tf.concat([codes, [-1]], 0)[ahead]


def _tiff_orientation(tiff: Any) -> Any:
    """Return the orientation, int32 [], that an EXIF block, string [], asks for: by its first entry with the tag."""
    import tensorflow as tf

    little = tf.equal(tf.strings.substr(tiff, 0, 2), b"II")
    known = little | tf.equal(tf.strings.substr(tiff, 0, 2), b"MM")
    whole = tf.strings.length(tiff) >= 8
    directory = _number(_octets(tiff, tf.constant(4, tf.int64), 4), little)
    count = _number(_octets(tiff, directory, 2), little)
    # The last two of an entry's 12 bytes are never read, so an entry without them counts. A segment's 64 kB bound all.
    octets = tf.concat([_octets(tiff, directory + 2, 12 * count), tf.zeros([2], tf.int64)], 0)
    entries = tf.reshape(octets[: tf.size(octets) // 12 * 12], [-1, 12])

    def column(k: int) -> Any:
        high, low = entries[:, k], entries[:, k + 1]
        return tf.where(little, low * 256 + high, high * 256 + low)

    found = tf.boolean_mask(tf.stack([column(2), column(8)], 1), tf.equal(column(0), 0x0112))
    kind, value = tf.unstack(tf.concat([found, [[0, 0]]], 0)[0])
    sensible = known & whole & tf.equal(kind, 3) & (value >= 1) & (value <= 8)
    return tf.cast(tf.where(sensible, value, 1), tf.int32)


def _octets(data: Any, position: Any, count: Any) -> Any:
    """Return int64 [N], the bytes from `position` on: fewer than `count` where the data end."""
    import tensorflow as tf

    size = tf.cast(tf.strings.length(data), tf.int64)
    piece = tf.strings.substr(data, tf.minimum(position, size), tf.cast(count, tf.int64))
    return tf.cast(tf.io.decode_raw(piece, tf.uint8), tf.int64)


def _number(octets: Any, little: Any) -> Any:
    """Return the number, int64 [], of up to four bytes, int64 [N], in either order."""
    import tensorflow as tf

    powers = tf.constant([1, 1 << 8, 1 << 16, 1 << 24], tf.int64)[: tf.size(octets)]
    return tf.reduce_sum(octets * tf.where(little, powers, powers[::-1]))
