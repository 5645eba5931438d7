import io
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import load_pixels
from PIL import Image

from cnn_ray.config import DataConfig
from cnn_ray.dataset import SPLITS, LabelledSet, draw_validation, read_labelled_set, share_of_rank
from cnn_ray.errors import DataError
from cnn_ray.records import QuarantineCode


def png(colour: int = 9) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 16), (colour % 256, colour // 256, 0)).save(stream, "PNG")
    return stream.getvalue()


def class_folders(root, **counts):
    for label, count in counts.items():
        (root / label).mkdir(parents=True)
        for k in range(count):
            (root / label / f"{k:03}.png").write_bytes(png(k))
    return root


def manifest(path, rows, columns="uri,label,group,side"):
    path.write_text("\n".join([columns, *rows]))
    for k, name in enumerate(row.split(",")[0] for row in rows):
        if not name.startswith("..") and not (path.parent / name).exists():
            (path.parent / name).write_bytes(png(k))
    return path


def counts(labelled, split):
    return np.bincount(labelled.label_ids[labelled.rows(split)], minlength=len(labelled.labels)).tolist()


def test_class_folders_become_labels_and_a_stratified_split(tmp_path):
    root = class_folders(tmp_path / "d", cat=30, dog=10, _notes=3)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(png())
    (root / "README.txt").write_text("not in a class")
    labelled = read_labelled_set(DataConfig(uri=str(root), split_seed=1, near_duplicates="ignore"))
    assert labelled.labels == ("cat", "dog")
    assert counts(labelled, "train") == [24, 8]
    assert counts(labelled, "validation") == [6, 2]
    assert counts(labelled, "test") == [0, 0]
    assert list(labelled.uris) == sorted(labelled.uris)


def test_the_split_depends_on_the_seed_alone(tmp_path):
    config = DataConfig(uri=str(class_folders(tmp_path / "d", cat=30, dog=30)), near_duplicates="ignore")
    first, again, other = (read_labelled_set(config.model_copy(update={"split_seed": s})) for s in (1, 1, 2))
    assert first.digest() == again.digest()
    assert first.digest() != other.digest()


def test_s3_class_folders(s3_uri):
    from cnn_ray.storage import open_store

    store = open_store(s3_uri)
    for key in ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "_x/1.png"):
        store.put(key, png())
    labelled = read_labelled_set(DataConfig(uri=s3_uri, near_duplicates="ignore"))
    assert labelled.labels == ("a", "b")
    assert load_pixels(labelled.root_uri, labelled.uris, (8, 8)).pixels.shape == (4, 8, 8, 3)


def test_manifest_uris_start_at_its_folder(tmp_path):
    class_folders(tmp_path, a=3, b=3)
    rows = [f"{label}/{k:03}.png,{label},g,x" for label in "ab" for k in range(3)]
    labelled = read_labelled_set(DataConfig(uri=str(manifest(tmp_path / "m.csv", rows))))
    assert load_pixels(labelled.root_uri, labelled.uris, (16, 20)).pixels[2, 0, 0].tolist() == [2, 0, 0]


def test_parquet_manifest_with_given_split(tmp_path):
    table = pa.table(
        {
            "uri": [f"{k}.png" for k in range(6)],
            "label": [0, 1] * 3,
            "side": ["train"] * 2 + ["validation"] * 2 + ["test"] * 2,
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    for k in range(6):
        (tmp_path / f"{k}.png").write_bytes(png(k))
    labelled = read_labelled_set(DataConfig(uri=str(tmp_path / "m.parquet"), split_column="side"))
    assert labelled.labels == ("0", "1")
    assert [labelled.rows(split).tolist() for split in SPLITS] == [[0, 1], [2, 3], [4, 5]]


def test_a_split_column_without_validation_gets_one_from_train(tmp_path):
    rows = [f"{k}.png,{'ab'[k % 2]},g,{'test' if k < 4 else 'train'}" for k in range(24)]
    config = DataConfig(uri=str(manifest(tmp_path / "m.csv", rows)), split_column="side")
    labelled = read_labelled_set(config)
    assert [counts(labelled, split) for split in SPLITS] == [[8, 8], [2, 2], [2, 2]]


@pytest.mark.parametrize("seed", range(8))
def test_groups_stay_whole_and_classes_near_their_share(tmp_path, seed):
    rng = np.random.default_rng(seed)
    rows = [f"{k}.png,{'abc'[min(int(rng.integers(0, 8)), 2)]},g{int(rng.integers(0, 60))},x" for k in range(400)]
    config = DataConfig(uri=str(manifest(tmp_path / "m.csv", rows)), group_column="group", validation_fraction=0.25)
    labelled = read_labelled_set(config.model_copy(update={"split_seed": seed}))
    sides = [{labelled.groups[k] for k in labelled.rows(split)} for split in ("train", "validation")]
    assert not sides[0] & sides[1]
    for train, validation in zip(counts(labelled, "train"), counts(labelled, "validation"), strict=True):
        assert validation / (train + validation) == pytest.approx(0.25, abs=0.06)


def test_no_class_is_left_without_validation():
    """One class has two small images in the groups of another one that is over its target already."""
    groups = ["big"] * 50 + ["p", "q"]
    taken = draw_validation(groups, np.array([0] * 25 + [1] * 25 + [0, 1]), 0.02, seed=0)
    assert not taken[:50].any()
    assert taken[50:].all()


def test_an_added_image_moves_no_other_one(tmp_path):
    root = class_folders(tmp_path / "d", cat=40, dog=40)
    before = read_labelled_set(DataConfig(uri=str(root), split_seed=3))
    (root / "cat" / "new.png").write_bytes(png())
    after = read_labelled_set(DataConfig(uri=str(root), split_seed=3))
    side = dict(zip(after.uris, after.splits, strict=True))
    assert sum(side[uri] != split for uri, split in zip(before.uris, before.splits, strict=True)) <= 1


def test_limit_takes_evenly_from_the_classes(tmp_path):
    root = class_folders(tmp_path / "d", cat=40, dog=7)
    labelled = read_labelled_set(DataConfig(uri=str(root), limit=12))
    assert np.bincount(labelled.label_ids).tolist() == [6, 6]


FAILURES = {
    "nothing": ({}, {}, "Received: none."),
    "one class": ({"cat": 4}, {}, "only 'cat'"),
    "one label": ({"cat": 4, "dog": 4}, {"labels": ("cat",)}, "only 'cat'"),
    "label without images": ({"cat": 4, "dog": 4}, {"labels": ("cat", "dog", "fox")}, "none of 'fox'"),
    "labels twice": ({"cat": 4, "dog": 4}, {"labels": ("cat", "dog", "cat")}, "Expected different labels"),
    "single image": ({"cat": 4, "dog": 1}, {}, "Expected images of 'dog' in validation"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_unfit_folders_are_refused_in_one_sentence(tmp_path, name):
    folders, settings, sentence = FAILURES[name]
    (tmp_path / "d").mkdir()
    class_folders(tmp_path / "d", **folders)
    with pytest.raises(DataError, match=sentence) as refused:
        read_labelled_set(DataConfig(uri=str(tmp_path / "d"), **settings))
    assert "Next: " in str(refused.value)


MANIFEST_FAILURES = {
    "column": (["a.png,x,g,train"], {"label_column": "lable"}, "did you mean label"),
    "empty label": (["a.png,x,g,train", "b.png,,g,train"], {}, "none in row 2"),
    "outside": (["../a.png,x,g,train"], {}, r"Received: '\.\./a.png'"),
    "twice": (["a.png,x,g,train", "./a.png,y,g,train"], {}, "a.png twice"),
    "split name": (["a.png,x,g,train", "b.png,y,g,tarin"], {"split_column": "side"}, "Received: 'tarin'"),
    "one group": (
        ["a.png,x,g,train", "b.png,y,g,train"],
        {"group_column": "group"},
        "Expected images of 'x' in validation",
    ),
}


@pytest.mark.parametrize("name", MANIFEST_FAILURES)
def test_unfit_manifests_are_refused_in_one_sentence(tmp_path, name):
    rows, settings, sentence = MANIFEST_FAILURES[name]
    with pytest.raises(DataError, match=sentence) as refused:
        read_labelled_set(DataConfig(uri=str(manifest(tmp_path / "m.csv", rows)), **settings))
    assert "Next: " in str(refused.value)


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    uris = []
    for k, data in enumerate([png(1), b"", png(2), png(3)]):
        (tmp_path / f"{k}.png").write_bytes(data)
        uris.append(str(tmp_path / f"{k}.png"))
    loaded = load_pixels(str(tmp_path), [*uris, str(tmp_path / "gone.png")], (8, 8))
    assert loaded.kept.tolist() == [0, 2, 3]
    assert loaded.pixels[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert loaded.failures == {QuarantineCode.EMPTY: 1, QuarantineCode.NOT_FOUND: 1}


def labelled_of(count: int) -> LabelledSet:
    return LabelledSet(
        "m", tuple(map(str, range(count))), np.arange(count, dtype=np.int32) % 2, ("a", "b"), np.zeros(count, np.uint8)
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_ranks_hold_every_row_once_in_the_strata_of_one_worker(world_size):
    labelled = labelled_of(37)
    single = share_of_rank(labelled, "train", 0, 1, 8, seed=4)
    together = {}
    for rank in range(world_size):
        share = share_of_rank(labelled, "train", rank, world_size, 8, seed=4)
        together |= dict(zip(share.rows.tolist(), share.strata.tolist(), strict=True))
        assert abs(len(share.rows) - 37 / world_size) <= 5
    assert together == dict(zip(single.rows.tolist(), single.strata.tolist(), strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_global_batch_has_the_same_rows_for_any_number_of_workers(world_size):
    from cnn_ray.batches import make_batches

    labelled = labelled_of(37)

    def global_batches(size: int) -> list[set[int]]:
        found: list[set[int]] = [set() for _ in range(5)]
        for rank in range(size):
            share = share_of_rank(labelled, "train", rank, size, 8, seed=4)
            numbers = share.rows.astype(np.uint8).reshape(-1, 1, 1, 1)
            batches = make_batches(numbers, np.zeros(len(share.rows)), share.strata, 8, size)
            for k, (pixels, _, weights) in enumerate(batches.epoch(5, (4, 1))):
                found[k] |= set(pixels[weights > 0].ravel().tolist())
        return found

    single = global_batches(1)
    assert global_batches(world_size) == single
    assert [len(batch) for batch in single] == [8, 8, 8, 8, 5]


def test_importing_the_dataset_loads_neither_tensorflow_nor_ray():
    code = "import sys, cnn_ray.dataset, cnn_ray.train; print({'tensorflow', 'keras', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_packed_set_in_a_manifest_must_be_allowed_like_a_file(tmp_path, s3_uri):
    from factories import write_packed_cifar10

    write_packed_cifar10(tmp_path / "set.npz", 20, 0)
    rows = [f"set.npz#{k},{'xy'[k % 2]},g{k}," for k in range(20)]
    config = DataConfig(uri=str(manifest(tmp_path / "m.csv", rows)), near_duplicates="ignore")
    labelled = read_labelled_set(config)
    assert labelled.uris[0] == f"{tmp_path}/set.npz#0"
    assert len(load_pixels(labelled.root_uri, labelled.uris, (8, 8)).kept) == 20
    from cnn_ray.storage import open_store

    open_store(s3_uri).put("m.csv", f"uri,label\n{tmp_path}/set.npz#0,x\n{tmp_path}/set.npz#1,y\n".encode())
    with pytest.raises(DataError, match="Expected image locations below"):
        read_labelled_set(DataConfig(uri=f"{s3_uri}/m.csv"))


def test_a_packed_image_that_is_not_there_is_one_unreadable_row(tmp_path):
    from factories import write_packed_cifar10

    write_packed_cifar10(tmp_path / "set.npz", 20, 0)
    uris = [f"{tmp_path}/set.npz#{k}" for k in (0, 1, 99)]
    loaded = load_pixels(str(tmp_path), uris, (8, 8))
    assert loaded.kept.tolist() == [0, 1]
    assert loaded.failures == {QuarantineCode.NOT_FOUND: 1}
