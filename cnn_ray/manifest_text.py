# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""The bytes of a manifest as UTF-8 text: unpacked within bounds, without a byte order mark, and never guessed."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib

from cnn_ray.errors import DataError

MOST_BYTES = (1 << 31) - 2
"""Of one manifest file, unpacked: some ten million rows. Arrow reads at most this much as one block."""
TAME_BYTES = 256 << 20
TAME_RATIO = 200
"""gzip shrinks real manifests 5 to 50 times. A small file that would fill the memory is refused on the way."""

_GZIP = b"\x1f\x8b"
_OTHER_KINDS = (
    (b"PAR1", "a Parquet file", "name it with .parquet"),
    (b"PK\x03\x04", "a zip file or an Excel workbook", "save it as CSV"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it, or pack it with gzip"),
    (b"BZh", "a bzip2 file", "unpack it, or pack it with gzip"),
    (b"\xfd7zXZ", "an xz file", "unpack it, or pack it with gzip"),
    (b"ORC", "an ORC file", "write it as Parquet or CSV"),
)
_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def utf8_text(raw: bytes, uri: str) -> bytes:
    """Return the text of a manifest file as UTF-8 bytes; gzip is known by its first bytes, whatever the name says.

    Raises:
        DataError: the file is damaged, of another kind, in another encoding, or too large.
    """
    if raw.startswith(_GZIP):
        raw = unpacked(raw, uri)
    for first, kind, fix in _OTHER_KINDS:
        if raw.startswith(first) and not (first == b"ORC" and raw[3:4].isalnum()):
            raise DataError(f"Expected text in {uri}. Received: {kind}. Next: {fix}.")
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            raise _another_encoding(uri, encoding)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if b"\0" in raw:
        raise _another_encoding(uri, "NUL bytes, as in UTF-16 or in a file that is no text")
    if not raw.isascii():
        try:
            codecs.utf_8_decode(raw, "strict", True)
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            byte = raw[error.start]
            raise _another_encoding(uri, f"byte 0x{byte:02X} in line {line}, as in Latin-1 or Windows-1252") from None
    return raw


def unpacked(raw: bytes, uri: str) -> bytes:
    """Return the bytes that a gzip file holds.

    Raises:
        DataError: it is damaged, or holds more than a manifest may.
    """
    parts: list[bytes] = []
    total = 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            while part := file.read(8 << 20):
                parts.append(part)
                total += len(part)
                if total > MOST_BYTES or (total > TAME_BYTES and total > TAME_RATIO * len(raw)):
                    raise DataError(
                        f"Expected at most {MOST_BYTES >> 20} MiB in {uri}, and at most {TAME_RATIO} times the bytes "
                        f"of the file. Received: {len(raw)} bytes that hold more. Next: unpack or split the file."
                    )
    except (EOFError, OSError, zlib.error) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"Expected a whole gzip file in {uri}. Received: {reason}. Next: write it again.") from None
    return b"".join(parts)


def _another_encoding(uri: str, encoding: str) -> DataError:
    return DataError(f"Expected UTF-8 text in {uri}. Received: {encoding}. Next: save the file as UTF-8.")
