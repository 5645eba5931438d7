"""Which names below an input are no images: files of operating systems, of file managers and of programs that write."""

from __future__ import annotations

import re

_FOLDERS = (
    "_temporary", "__MACOSX", "@eaDir", r"lost\+found", r"\.git", r"\.svn", r"\.hg", r"\.ipynb_checkpoints",
    r"\.Trash[^/]*",
    r"\.Spotlight-V100", r"\.fseventsd", r"\.TemporaryItems", r"\.AppleDouble", r"\$RECYCLE\.BIN",
    "System Volume Information", "_delta_log", "__pycache__",
)  # fmt: skip
_FILES = (
    r"\.DS_Store", r"\._[^/]*", r"\.localized", r"Thumbs\.db", r"ehthumbs\.db", r"[dD]esktop\.ini", r"Icon\r",
    r"\.keep", r"\.gitkeep", r"\.gitignore", r"\.gitattributes", r"\.directory", r"\.nfs[0-9a-f]+", r"~\$[^/]*",
    r"[^/]*_\$folder\$", r"\.[^/]*\.crc", r"_committed_[^/]*", r"_started_[^/]*", "_SUCCESS",
)  # fmt: skip
SYSTEM_PATTERN = f"(?:^|/)(?:(?:{'|'.join(_FOLDERS)})/|(?:{'|'.join(_FILES)})$)"
"""Regular expression, in the syntax that `re` and RE2 share, over keys relative to the input.

Only names that no image has: a hash that names an image may begin with `_`, so that alone decides nothing.
"""
_SYSTEM = re.compile(SYSTEM_PATTERN)


def is_system_file(key: str) -> bool:
    """Return whether a key relative to the input is a file of an operating system or of a writer, not an image."""
    return _SYSTEM.search(key) is not None
