# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""CSV -> a table whose every cell is the text that stands in the file. No type is guessed.

Arrow parses what is quoted as RFC 4180 says. All else goes to Python's csv module, which is slower, takes quotes in
the middle of a cell, and knows the line of an error. Arrow gets the whole file as one block: pyarrow 26 loses a line
feed where "\\r\\n" inside quotes falls onto the edge of two blocks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from cnn_ray.errors import DataError
from cnn_ray.manifest_text import MOST_BYTES

BATCH_ROWS = 16_384


def csv_table(text: bytes, uri: str, delimiter: str = ",", header: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of `text` (UTF-8). Names come from its first row, or from `header` where it has none.

    Empty lines are no rows. A cell may hold the delimiter, quotes and line breaks, if it is quoted.

    Raises:
        DataError: there is no header, it names a column twice, a row has another number of cells, or a quote is wrong.
    """
    names = list(header) if header is not None else _header(text, uri, delimiter)
    quick = _by_arrow(text, delimiter, len(names)) if _is_plain(text, delimiter) else None
    table = quick if quick is not None else _by_python(text, uri, delimiter, len(names))
    return table.slice(0 if header is not None else 1).rename_columns(names)


def refuse_repeated(names: Sequence[str], uri: str) -> None:
    """Return where each column has a name of its own.

    Raises:
        DataError: a name stands twice in the header.
    """
    if len(set(names)) < len(names):
        name = next(name for number, name in enumerate(names) if name in names[:number])
        places = [str(number) for number, other in enumerate(names, 1) if other == name]
        raise DataError(
            f"Expected each column once in the header of {uri}. Received: {name!r} in columns {', '.join(places)}. "
            "Next: rename one of them."
        )


def line_of_row(text: bytes, delimiter: str, row: int) -> int:
    """Return the line of the file in which the row begins; row 0 is the first row of the file."""
    reader, end = _reader(text, delimiter), 0
    seen = -1
    for cells in reader:
        seen += bool(cells)
        if seen == row:
            break
        end = reader.line_num
    return end + 1


def _header(text: bytes, uri: str, delimiter: str) -> list[str]:
    names = next(_rows(text, uri, delimiter), None)
    if names is None:
        raise DataError(f"Expected a header and rows in {uri}. Received: an empty file. Next: write it again.")
    refuse_repeated(names, uri)
    return names


def _reader(text: bytes, delimiter: str) -> Any:
    lines = io.TextIOWrapper(io.BytesIO(text), "utf-8", newline="")
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _rows(text: bytes, uri: str, delimiter: str) -> Iterator[list[str]]:
    """Every row that has cells.

    Raises:
        DataError: a quote opens and never closes, or closes in the middle of a cell.
    """
    reader, row, end = _reader(text, delimiter), 0, 0
    before = csv.field_size_limit(MOST_BYTES)
    try:
        for cells in reader:
            if cells:
                yield cells
                row += 1
            end = reader.line_num
    except csv.Error as error:
        reason = str(error)
        if "unexpected end of data" in reason:
            reason = "a quote that opens there and never closes"
        raise DataError(
            f"Expected quoted cells as in RFC 4180 in {uri}. Received: {reason}, in the row that begins in line "
            f"{end + 1}. Next: close each quote, and double those inside of a quoted cell."
        ) from None
    finally:
        csv.field_size_limit(before)


def _is_plain(text: bytes, delimiter: str) -> bool:
    """Whether quotes stand only around whole cells, and doubled inside of them: Arrow and csv agree on such files."""
    raw = np.frombuffer(text, np.uint8)
    quotes = np.flatnonzero(raw == ord('"'))
    if len(quotes) % 2:
        return False
    if not len(quotes):
        return True
    edge = np.zeros(256, bool)
    edge[[ord(delimiter), ord("\n"), ord("\r"), ord('"')]] = True
    opening, closing = quotes[0::2], quotes[1::2]
    before = edge[raw[np.maximum(opening - 1, 0)]] | (opening == 0)
    after = edge[raw[np.minimum(closing + 1, len(raw) - 1)]]  # at the very end it is the quote itself
    return bool(before.all() and after.all())


def _by_arrow(text: bytes, delimiter: str, width: int) -> pa.Table | None:
    """The rows, or None where Arrow does not take them."""
    names = [str(number) for number in range(width)]
    try:
        return pyarrow.csv.read_csv(
            pa.BufferReader(text),
            read_options=pyarrow.csv.ReadOptions(column_names=names, block_size=max(len(text) + 1, 1024)),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except pa.ArrowException:
        return None


def _by_python(text: bytes, uri: str, delimiter: str, width: int) -> pa.Table:
    schema = pa.schema([(str(number), pa.string()) for number in range(width)])
    rows = _rows(text, uri, delimiter)
    batches: list[pa.RecordBatch] = []
    count = 0
    while batch := list(islice(rows, BATCH_ROWS)):
        wrong = next((k for k, cells in enumerate(batch) if len(cells) != width), None)
        if wrong is not None:
            line = line_of_row(text, delimiter, count + wrong)
            raise DataError(
                f"Expected {width} cells in each row of {uri}. Received: {len(batch[wrong])} in the row that begins in "
                f"line {line}. Next: correct the row; a cell that holds the delimiter or a line break needs quotes."
            )
        columns = [pa.array(column, pa.string()) for column in zip(*batch, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
        count += len(batch)
    return pa.Table.from_batches(batches, schema)
