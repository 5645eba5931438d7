"""Names that are images and names that are not: fnmatch's patterns in Arrow, and what systems and writers leave."""

import fnmatch
import random
from collections import Counter

import pyarrow as pa
import pytest

from cnn_ray import inputs
from cnn_ray.config import ScoreConfig
from cnn_ray.errors import ConfigError
from cnn_ray.input_filters import NameFilter, Selection, describe_left_out, is_system_file
from cnn_ray.records import LISTING_SCHEMA
from cnn_ray.storage import open_store

SYSTEM = [
    ".DS_Store", "._a.png", "a/b/._a.png", "Thumbs.db", "a/thumbs.db", "ehthumbs.db", "Desktop.ini",
    "a/desktop.ini", "__MACOSX/a.png", "a/__MACOSX/b/c.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg",
    ".git/objects/00/ab", ".git/x.png", "a/.ipynb_checkpoints/a-checkpoint.png", ".Trashes/a.png",
    ".Trash-1000/files/a.png", "~$report.docx", "$RECYCLE.BIN/S-1/a.png", "System Volume Information/x",
    "lost+found/1", ".nfs000000000012", ".directory", "Icon\r", ".a.png.swp",
    ".cache/huggingface/download/a.png.metadata", ".~lock.a.ods#", "#recycle/a.png",
]  # fmt: skip
WRITER = [
    "_SUCCESS", "a/_SUCCESS", "_temporary/0/a.png", "a/_temporary/0/_temporary/x.png", ".keep", "a/.gitkeep",
    ".gitignore", "a_$folder$", "b/a_$folder$", ".part-0.crc", "a/.a.png.crc", "_committed_123", "a/_started_77",
    "a.png._COPYING_", "_delta_log/0.json", "_committed_vacuum8", ".spark-staging-1/a.png",
]  # fmt: skip
IMAGES = [
    "a.png", "_a.png", "_0f3a", "_temporary", "_temporary.png", "a_temporary/b.png", "my_SUCCESS", "_SUCCESS.png",
    "x/.hidden.png", "keep", "a.keep.png", ".keep/a.png", "MACOSX/a.png", "git/a.png", "a.git/b.png",
    "Thumbs.db.png", "crc", "a.crc", "b/a.crc", "_started_shot.png", "_committed_a-b", "desktop.ini/a.png",
    "._/a.png", "$folder$.png", "a_$folder$x", "~a.png", "Icon", "a/Trash/b.png", ".gitkeep.png", "a.DS_Store",
    "_SUCCESS/a.png", "nfs0000000012", "@eaDir", "日本.png", "line\nbreak.png",
]  # fmt: skip


def test_patterns_match_what_fnmatch_matches():
    draw = random.Random(7)
    letters = "ab*?[]!-^\\/.é{|(&~+\n"
    for _ in range(4000):
        patterns = ["".join(draw.choices(letters, k=draw.randint(1, 8))) for _ in range(draw.randint(1, 2))]
        patterns = [pattern.rstrip("/") or "*" for pattern in patterns]
        names = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(30)]
        matched = [any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in names]
        assert kept(names, include=patterns) == [n for n, m in zip(names, matched, strict=True) if m], patterns
        assert kept(names, exclude=patterns) == [n for n, m in zip(names, matched, strict=True) if not m], patterns


def kept(names, root="/r.o[o]t", counts=None, **patterns):
    selection = Selection(**{key: tuple(value) for key, value in patterns.items()})
    name_filter = NameFilter(root, selection, Counter() if counts is None else counts)
    table = pa.table(
        [[f"{root}/{name}" for name in names], ["e"] * len(names), [1] * len(names)], schema=LISTING_SCHEMA
    )
    return [uri.removeprefix(f"{root}/") for uri in name_filter.selected(table)["uri"].to_pylist()]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"include": ["*.png"]}, ["a.png", "d/b.png", "d/e/c.png", "thumbs/t.png"]),
        ({"include": ["*.png", "*.PNG"]}, ["A.PNG", "a.png", "d/b.png", "d/e/c.png", "thumbs/t.png"]),
        ({"include": ["d/*"]}, ["d/b.png", "d/e/c.png", "d/x.json"]),
        ({"include": ["d/"]}, ["d/b.png", "d/e/c.png", "d/x.json"]),
        ({"include": ["d/"], "exclude": ["*.json"]}, ["d/b.png", "d/e/c.png"]),
        ({"exclude": ["thumbs/", "*.json", "*.PNG"]}, ["a.png", "d/b.png", "d/e/c.png"]),
        ({"include": ["?.png"]}, ["a.png"]),
        ({"include": ["nothing"]}, []),
        ({}, ["A.PNG", "a.png", "d/b.png", "d/e/c.png", "d/x.json", "thumbs/t.png"]),
    ],
)
def test_patterns_over_folders(patterns, expected):
    names = ["A.PNG", "a.png", "d/b.png", "d/e/c.png", "d/x.json", "thumbs/t.png"]
    counts = Counter()
    assert kept(names, counts=counts, **patterns) == expected
    assert counts.total() == len(names) - len(expected)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_files_of_systems_and_writers_are_no_images_and_are_counted(tmp_path, place, request):
    uri = str(tmp_path / "__MACOSX") if place == "local" else f"{request.getfixturevalue('s3_uri')}/_temporary"
    store = open_store(uri)
    names = [*SYSTEM, *WRITER, *IMAGES]
    clash = {"_temporary", "_SUCCESS", "._", "@eaDir", ".keep", "_SUCCESS/a.png", ".keep/a.png", "desktop.ini/a.png"}
    if place == "local":  # a folder has no file and folder of one name
        names = [name for name in names if name not in clash]
    else:  # moto takes no line break
        names = [name for name in names if "\n" not in name and "\r" not in name]
    for name in names:
        store.put(name, b"x")
    store.put("_EMPTY", b"")
    store.put("a/empty.png", b"")
    counts = Counter()
    tables = inputs.list_inputs(uri, "uri", left_out=counts)
    listed = [uri for table in tables for uri in table["uri"].to_pylist()]
    images = [name for name in names if name in IMAGES] + ["a/empty.png"]
    assert listed == sorted((store.uri_of(name) for name in images), key=str.encode)
    writers = sum(name in WRITER for name in names) + 1
    assert counts == {"system_file": sum(name in SYSTEM for name in names), "writer_file": writers}


def test_one_name_is_judged_as_a_table_of_them():
    assert [name for name in (*SYSTEM, *WRITER) if not is_system_file(name)] == []
    assert [name for name in IMAGES if is_system_file(name)] == []


def test_a_manifest_is_taken_at_its_word_but_for_patterns(tmp_path):
    for name in ("a.png", "b.json", "d/c.png"):
        open_store(str(tmp_path)).put(name, b"x")
    (tmp_path / "m.csv").write_text(f"uri\na.png\nb.json\nd/c.png\n.DS_Store\n{tmp_path}-other/x.png\n")
    counts = Counter()

    def listed(**patterns):
        tables = inputs.list_inputs(str(tmp_path / "m.csv"), "uri", selection=Selection(**patterns), left_out=counts)
        return [uri.removeprefix(str(tmp_path)) for table in tables for uri in table["uri"].to_pylist()]

    assert listed() == ["-other/x.png", "/.DS_Store", "/a.png", "/b.json", "/d/c.png"]
    assert not counts
    assert listed(include=("*.png",)) == ["-other/x.png", "/a.png", "/d/c.png"]
    assert listed(include=("d/*",)) == ["/d/c.png"]
    assert listed(exclude=(f"{tmp_path}-other/",)) == ["/.DS_Store", "/a.png", "/b.json", "/d/c.png"]
    assert counts == {"not_included": 2 + 4, "excluded": 1}


def test_patterns_that_cannot_be_meant_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected patterns such as"):
        ScoreConfig(model="a@1", input_uri="i", output_uri="o", include=("",))
    with pytest.raises(ConfigError, match="shorter or fewer include patterns"):
        list(inputs.list_inputs(str(tmp_path), "uri", selection=Selection(include=("é?" * 100_000,))))


def test_what_is_left_out_in_words():
    assert describe_left_out({"excluded": 1200, "broken_link": 1}) == (
        "1,200 files that --exclude names, 1 link that leads nowhere"
    )
    assert describe_left_out({}) == ""
