"""Objects that are stored with a Content-Encoding: what was put there compressed is read as what it was before.

Upload tools compress on the way (`gsutil cp -Z`, CDNs, log shippers) and leave the picture's own name and type. HTTP
says that such an object *is* the picture. Bytes come from attackers, so they are counted while they grow.
"""

from __future__ import annotations

import re
import zlib

from cnn_ray.errors import DamagedError, EncodedError, TooLargeError

MOST_BYTES = 1 << 30
"""Bound where the caller names none."""
_MAGIC = b"\x1f\x8b\x08"
_MOST_MEMBERS = 64
"""Each one costs a copy of what follows."""
_GZIP = zlib.MAX_WBITS | 16
_NO_CODING = {"", "identity", "aws-chunked"}
"""Says nothing about the stored bytes: aws-chunked is how they travelled, and some servers keep the word."""
_UNREAD = {"br", "zstd", "deflate", "compress", "x-compress"}
_NAME = re.compile(r"[a-z0-9-]{1,20}")


def decoded(data: bytes, content_encoding: str | None, uri: str, max_bytes: int | None) -> bytes:
    """Return the bytes before their Content-Encoding, at most `max_bytes`.

    Words that are no coding of HTTP, such as utf-8, are common mistakes and change nothing; nor does gzip where the
    bytes are no gzip file, because servers and proxies on the way may have decoded them.

    Raises:
        TooLargeError: there are more.
        DamagedError: they are no whole gzip file.
        EncodedError: another coding, or more than one.
    """
    if not content_encoding:
        return data
    codings = [word.strip() for word in content_encoding.lower().split(",")]
    codings = [word for word in codings if word not in _NO_CODING]
    unread = [word for word in codings if word in _UNREAD]
    if unread or len(codings) > 1:
        shown = ", ".join(word for word in codings if _NAME.fullmatch(word))
        raise EncodedError(
            f"Expected {uri} without a Content-Encoding, or with gzip. Received: {shown}. "
            "Next: store the object without it."
        )
    if codings not in (["gzip"], ["x-gzip"]) or not data.startswith(_MAGIC):
        return data
    return _gunzipped(data, uri, MOST_BYTES if max_bytes is None else max_bytes)


def _gunzipped(data: bytes, uri: str, most: int) -> bytes:
    """Return what all members of a gzip file hold; what follows the last one is ignored, as gzip does."""
    pieces: list[bytes] = []
    size = 0
    while data.startswith(_MAGIC) and len(pieces) < _MOST_MEMBERS:
        member = zlib.decompressobj(_GZIP)
        try:
            piece = member.decompress(data, most - size + 1)
        except zlib.error:
            raise DamagedError(
                f"Expected a gzip file in {uri}. Received: a damaged one. Next: store it again."
            ) from None
        size += len(piece)
        if size > most:
            raise TooLargeError(
                f"Expected at most {most} bytes in {uri}. Received: more, compressed by Content-Encoding: gzip. "
                "Next: raise the limit."
            )
        if not member.eof:
            raise DamagedError(f"Expected a whole gzip file in {uri}. Received: its beginning. Next: store it again.")
        pieces.append(piece)
        data = member.unused_data
    return b"".join(pieces)
