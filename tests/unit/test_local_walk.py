"""Links in a local folder: left out and counted, or followed once, whatever loops they make."""

from collections import Counter

import pytest

from cnn_ray.errors import AccessDeniedError
from cnn_ray.storage import LocalStore


@pytest.fixture
def place(tmp_path):
    """A folder `in` beside a folder `out`, with links of every kind."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "d").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    (inside / "d/a.png").write_text("a")
    (outside / "b.png").write_text("bb")
    (outside / "deep/c.png").write_text("ccc")
    (inside / "file-out.png").symlink_to(outside / "b.png")
    (inside / "file-in.png").symlink_to("d/a.png")
    (inside / "folder-out").symlink_to("../out")
    (inside / "folder-in").symlink_to("d")
    (inside / "nowhere").symlink_to(outside / "none")
    (inside / "self").symlink_to("self")
    (inside / "up").symlink_to("..")
    (outside / "back").symlink_to(inside)
    (outside / "deep/loop").symlink_to("..")
    return inside


def listed(folder, **options):
    counts = Counter()
    store = LocalStore(str(folder), **options)
    uris = [uri for table in store.list(left_out=counts) for uri in table["uri"].to_pylist()]
    return [uri.removeprefix(f"{folder}/") for uri in uris], dict(counts)


def test_links_that_lead_outside_are_left_out_and_counted(place):
    names, counts = listed(place)
    assert names == ["d/a.png", "file-in.png"]
    assert counts == {"link_outside": 3, "link_to_folder": 1, "broken_link": 2}


def test_followed_links_lead_to_each_folder_once(place):
    names, counts = listed(place, follow_symlinks=True)
    assert names == ["d/a.png", "file-in.png", "file-out.png", "folder-out/b.png", "folder-out/deep/c.png"]
    assert counts == {"link_to_folder": 2, "broken_link": 2, "repeated_folder": 3}


def test_many_links_to_folders_of_links_are_no_bomb(tmp_path):
    for level in range(30):
        (tmp_path / f"out/{level}").mkdir(parents=True)
        for name in "ab":
            (tmp_path / f"out/{level}/{name}").symlink_to(f"../{level + 1}")
    (tmp_path / "out/30").mkdir()
    (tmp_path / "out/30/x.png").write_text("x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/start").symlink_to("../out/0")
    names, counts = listed(tmp_path / "in", follow_symlinks=True)
    assert names == ["start/" + "a/" * 30 + "x.png"]
    assert counts == {"repeated_folder": 30}


def test_what_is_listed_can_be_read_and_has_the_etag_of_its_target(place):
    store = LocalStore(str(place), follow_symlinks=True)
    (table,) = store.list()
    for row in table.to_pylist():
        key = row["uri"].removeprefix(f"{place}/")
        assert len(store.get(key, if_match=row["etag"])) == row["size_bytes"]
    with pytest.raises(AccessDeniedError, match="--follow-symlinks"):
        LocalStore(str(place)).get("file-out.png")


def test_a_listing_by_prefix_counts_only_there(place):
    store = LocalStore(str(place))
    counts = Counter()
    assert [table.num_rows for table in store.list("d/", counts)] == [1]
    assert not counts
