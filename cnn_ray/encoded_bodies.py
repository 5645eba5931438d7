# pyright: strict
"""Bodies with a Content-Encoding (RFC 9110, 8.4): gzip and deflate, inflated within the limit of a plain body.

TensorFlow Serving, Triton and MLServer take them. A small body may inflate to a thousand times its size, so the limit
is kept while it grows: a bomb costs no more than the largest body that is allowed.
"""

from __future__ import annotations

import zlib

from cnn_ray.json_bodies import shown
from cnn_ray.protocol import check_body_size
from cnn_ray.request_errors import EncodingError, RequestError

ACCEPTED = "gzip, deflate"
_GZIP = 16 + zlib.MAX_WBITS
_PIECE_BYTES = 1 << 20


def encoding_of(header: str | None) -> str | None:
    """Return `gzip` or `deflate` for a Content-Encoding header, None where the body is as it is.

    Raises:
        EncodingError: another encoding, or several.
    """
    name = (header or "").strip().lower()
    if name in ("", "identity"):
        return None
    if name in ("gzip", "x-gzip"):
        return "gzip"
    if name == "deflate":
        return "deflate"
    raise EncodingError(f"Expected a body with Content-Encoding {ACCEPTED} or none. Received: {shown(name)}.")


def inflate(body: bytes, encoding: str, most: int) -> bytes:
    """Return the body without its encoding.

    Raises:
        BodyTooLargeError: it has more than `most` bytes.
        RequestError: it is damaged, cut or followed by other bytes.
    """
    # "deflate" is zlib's format; some clients send the bare one, which begins with other bits.
    bare = encoding == "deflate" and not (len(body) > 1 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0)
    window = _GZIP if encoding == "gzip" else -zlib.MAX_WBITS if bare else zlib.MAX_WBITS
    pieces: list[bytes] = []
    size = 0
    try:
        while body:
            inflater = zlib.decompressobj(window)
            while not inflater.eof:
                piece = inflater.decompress(body, min(_PIECE_BYTES, most - size + 1))
                size += len(piece)
                check_body_size(size, most)
                pieces.append(piece)
                body = inflater.unconsumed_tail
                if not piece and not body and not inflater.eof:
                    raise RequestError(f"Expected a whole {encoding} body. Received: one that ends early.")
            body = inflater.unused_data
            if body and encoding != "gzip":  # a gzip file may have several members
                raise RequestError(f"Expected one {encoding} stream. Received: {len(body)} bytes behind it.")
    except zlib.error:
        raise RequestError(f"Expected a body in {encoding}. Received: bytes that are not.") from None
    return b"".join(pieces)
