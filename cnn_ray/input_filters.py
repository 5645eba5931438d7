# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""Which names below an input are images to be scored: patterns of the user, and files that are never images.

Patterns are those of `fnmatch.fnmatchcase` on the name relative to the input: `*` takes `/` too, so `*.png` is every
PNG at any depth and `thumbs/*` whatever lies in the folder thumbs. They are translated to RE2 and matched by Arrow,
because an input may have ten million names. What is left out is counted by reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.errors import ConfigError

SYSTEM_FILE = "system_file"
WRITER_FILE = "writer_file"
EXCLUDED = "excluded"
NOT_INCLUDED = "not_included"
LINK_OUTSIDE = "link_outside"
LINK_TO_FOLDER = "link_to_folder"
REPEATED_FOLDER = "repeated_folder"
BROKEN_LINK = "broken_link"
SPECIAL_FILE = "special_file"
REASONS = {
    SYSTEM_FILE: ("file of an operating system or tool", "files of operating systems and tools"),
    WRITER_FILE: ("file that a writer left (_SUCCESS, .keep)", "files that writers left (_SUCCESS, .keep)"),
    EXCLUDED: ("file that --exclude names", "files that --exclude names"),
    NOT_INCLUDED: ("file that --include does not name", "files that --include does not name"),
    LINK_OUTSIDE: (
        "link that leads outside of INPUT (--follow-symlinks follows it)",
        "links that lead outside of INPUT (--follow-symlinks follows them)",
    ),
    LINK_TO_FOLDER: (
        "link to a folder of INPUT, which is listed where it lies",
        "links to folders of INPUT, which are listed where they lie",
    ),
    REPEATED_FOLDER: ("folder that was met before", "folders that were met before"),
    BROKEN_LINK: ("link that leads nowhere", "links that lead nowhere"),
    SPECIAL_FILE: ("pipe, socket or device", "pipes, sockets and devices"),
}
"""Why something in an input is no image to be scored: one of it and several, in words."""

_SYSTEM_FOLDERS = (
    r"__MACOSX|@eaDir|#recycle|lost\+found|System Volume Information|\$RECYCLE\.BIN|\.git|\.svn|\.hg|"
    r"\.ipynb_checkpoints|__pycache__|\.Trash[^/]*|\.Spotlight-V100|\.fseventsd|\.TemporaryItems|\.DocumentRevisions-V100|"
    r"\.AppleDouble|\.AppleDB|\.AppleDesktop|\.snapshot|\.zfs|\.cache/huggingface"
)
_SYSTEM_FILES = (
    r"\.DS_Store|\._[^/]*|\.localized|\.apdisk|\.VolumeIcon\.icns|Icon\r|[Tt]humbs\.db(?::encryptable)?|"
    r"ehthumbs(?:_vista)?\.db|[Dd]esktop\.ini|\.?[Pp]icasa\.ini|\.directory|\.nomedia|\.nfs[0-9a-f]{8,}|\.fuse_hidden[0-9a-f]+|"
    r"~\$[^/]*|\.~lock\.[^/]*#|\.[^/]*\.sw[op]"
)
_WRITER_FOLDERS = r"_temporary|_delta_log|_spark_metadata|\.spark-staging-[^/]*|\.hive-staging_[^/]*|\.~tmp~"
_WRITER_FILES = (
    r"_SUCCESS|\.keep|\.gitkeep|\.gitignore|\.gitattributes|[^/]*_\$folder\$|\.[^/]*\.crc|"
    r"_(?:committed|started)_[0-9A-Za-z]+|[^/]*\._COPYING_"
)
_SYSTEM = rf"(?:(?:{_SYSTEM_FOLDERS})/|(?:{_SYSTEM_FILES})\z)"
_WRITER = rf"(?:(?:{_WRITER_FOLDERS})/|(?:{_WRITER_FILES})\z)"
_NEVER_IMAGES = re.compile(rf"(?:\A|/)(?:{_SYSTEM}|{_WRITER})".replace(r"\z", r"\Z"))
_EMPTY_MARKER = r"/_[^/]*\z"
"""Where it is empty: a hash that names an image may begin with `_`, but then the object has bytes."""
_ANY = r"\x{0}-\x{10FFFF}"


@dataclass(frozen=True)
class Selection:
    """What of an input is taken: patterns of names, and whether links that lead outside are followed."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    follow_symlinks: bool = False


def is_system_file(key: str) -> bool:
    """Return whether a name relative to the input is a file of an operating system, a tool or a writer."""
    return _NEVER_IMAGES.search(key) is not None


class NameFilter:
    """Take the rows of listings that are images by their name; count the others by reason.

    `root` is the location of the input. Names outside of it, as a manifest may hold them, are matched whole.
    """

    def __init__(self, root: str, selection: Selection, left_out: Counter[str]) -> None:
        """Raise ConfigError where the patterns are too long together."""
        self._left_out = left_out
        self._root = f"{root.rstrip('/')}/"
        below = rf"\A{_literal(self._root)}(?:(?s:.*)/)?"
        self._system, self._writer = below + _SYSTEM, below + _WRITER
        self._never = rf"{below}(?:{_SYSTEM}|{_WRITER})"
        self._exclude, self._include = selection.exclude, selection.include
        for name, patterns in (("exclude", selection.exclude), ("include", selection.include)):
            self._refuse_too_long(name, patterns)

    def images(self, table: pa.Table) -> pa.Table:
        """Return the rows of a folder or bucket that are images to be scored."""
        never = pc.match_substring_regex(table["uri"], self._never)
        empty = pc.equal(table["size_bytes"], 0)
        if pc.any(pc.or_(never, empty)).as_py():
            writer = pc.or_(
                pc.match_substring_regex(table["uri"], self._writer),
                pc.and_(empty, pc.match_substring_regex(table["uri"], _EMPTY_MARKER)),
            )
            table = self._without(table, SYSTEM_FILE, pc.match_substring_regex(table["uri"], self._system), writer)
        return self.selected(table)

    def selected(self, table: pa.Table) -> pa.Table:
        """Return the rows that the patterns of the user take."""
        if self._exclude:
            table = self._without(table, EXCLUDED, self._matched(table["uri"], self._exclude))
        if self._include:
            table = self._without(table, NOT_INCLUDED, pc.invert(self._matched(table["uri"], self._include)))
        return table

    def _matched(self, uris: Any, patterns: Sequence[str]) -> Any:
        below = pc.match_substring_regex(uris, _regex(patterns, _literal(self._root)))
        inside = pc.starts_with(uris, self._root)
        if pc.all(inside).as_py():
            return below
        return pc.if_else(inside, below, pc.match_substring_regex(uris, _regex(patterns, "")))

    def _without(self, table: pa.Table, reason: str, mask: Any, writer: Any = None) -> pa.Table:
        """The table without the rows of the mask, and without those that a writer left, where that is asked."""
        self._count(reason, mask)
        if writer is not None:
            self._count(WRITER_FILE, pc.and_not(writer, mask))
            mask = pc.or_(mask, writer)
        return table.filter(pc.invert(mask)) if pc.any(mask).as_py() else table

    def _count(self, reason: str, mask: Any) -> None:
        count = int(pc.sum(mask).as_py() or 0)
        if count:
            self._left_out[reason] += count

    def _refuse_too_long(self, name: str, patterns: Sequence[str]) -> None:
        try:
            self._matched(pa.array([self._root], pa.string()), patterns or ("*",))
        except pa.ArrowInvalid:
            raise ConfigError(
                f"Expected shorter or fewer {name} patterns. Received: {len(patterns)} with "
                f"{sum(map(len, patterns)):,} characters, more than can be matched. Next: use wildcards."
            ) from None


def describe_left_out(counts: Mapping[str, int]) -> str:
    """Return what was left out in words, such as `2 links that lead nowhere, 1 pipe, socket or device`."""
    ordered = [reason for reason in REASONS if counts.get(reason)]
    return ", ".join(f"{counts[reason]:,} {REASONS[reason][counts[reason] > 1]}" for reason in ordered)


def re2_of(pattern: str) -> str:
    """Return the RE2 expression that matches what `fnmatch.fnmatchcase` matches; it has no anchors.

    A pattern that ends with `/` means what lies in that folder: no name of a file ends so.
    """
    found: list[str] = []
    rest = f"{pattern}*" if pattern.endswith("/") else pattern
    while rest:
        end = _class_end(rest)
        if rest[0] == "[" and end:
            found.append(_class(rest[1:end]))
            rest = rest[end + 1 :]
            continue
        found.append({"*": ".*", "?": "."}.get(rest[0]) or _literal(rest[0]))
        rest = rest[1:].lstrip("*") if rest[0] == "*" else rest[1:]
    return f"(?s:{''.join(found)})"


def _regex(patterns: Sequence[str], start: str) -> str:
    """The expression of all patterns together over whole locations, which begin with `start`."""
    return rf"\A{start}(?:{'|'.join(map(re2_of, patterns))})\z"


def _class_end(text: str) -> int:
    """Where the bracket that text begins with is closed, 0 where it is not: a `]` right behind it is a member."""
    start = 2 if text.startswith("[!") else 1
    return max(text.find("]", start + 1), 0)


def _class(inner: str) -> str:
    """The character class of what stands in brackets; a range that runs backwards has no members."""
    negated = inner.startswith("!")
    rest, members = inner[1:] if negated else inner, list[str]()
    while rest:
        if len(rest) > 2 and rest[1] == "-":
            if rest[0] <= rest[2]:
                members.append(f"{_code(rest[0])}-{_code(rest[2])}")
            rest = rest[3:]
        else:
            members.append(_code(rest[0]))
            rest = rest[1:]
    if not members:
        return f"[{_ANY}]" if negated else f"[^{_ANY}]"
    return f"[{'^' if negated else ''}{''.join(members)}]"


def _literal(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "/_") else _code(c) for c in text)


def _code(character: str) -> str:
    return rf"\x{{{ord(character):X}}}"
