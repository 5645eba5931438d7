"""Which files of an input are scored: patterns, files of systems, links. What is left out is said in every view."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from factories import image_bytes, write_images

from cnn_ray import outputs, score
from cnn_ray.cli import commands
from cnn_ray.config import ScoreConfig
from cnn_ray.errors import AccessDeniedError, ConfigError, NoImagesError, QuarantineLimitError
from cnn_ray.outputs import Partition
from cnn_ray.storage import open_store


def config(models: str, source, output, **changes) -> ScoreConfig:
    settings = {"model": "small@1", "models_uri": models, "input_uri": str(source), "output_uri": str(output)}
    return ScoreConfig(**{**settings, "shard_size": 8, "runner": "local", "report": False, **changes})


def crawled(folder):
    """Twelve screenshots, each with two files about it, and what a Mac leaves."""
    write_images(folder, 12)
    for path in sorted(folder.glob("*.png")):
        path.with_suffix(".json").write_text("{}")
        path.with_suffix(".html").write_text("<html></html>")
        (folder / f"._{path.name}").write_bytes(b"\0\5\026\7Mac OS X")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "_SUCCESS").write_bytes(b"")
    return folder


@pytest.mark.parametrize("place", ["another output", "the partition deleted"])
def test_the_advice_for_a_folder_with_other_files_works_when_followed(tmp_path, small_models, place):
    source, output = crawled(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(QuarantineLimitError) as caught:
        score.run_score(config(small_models, source, output))
    advice = str(caught.value)
    assert "24 not_an_image" in advice
    assert f"if .html, .json are no images, delete {output}/model=small/version=1 or choose another OUTPUT" in advice
    assert "run with --include '*.png'; otherwise look at the quarantine" in advice
    with pytest.raises(ConfigError, match=r"Expected include=none, as the plan .* Received: \*\.png"):
        score.run_score(config(small_models, source, output, include=["*.png"]))
    if place == "another output":
        output = tmp_path / "other"
    else:
        shutil.rmtree(f"{output}/model=small/version=1")
    result = score.run_score(config(small_models, source, output, include=["*.png"]))
    assert (result.manifest.scored, result.manifest.quarantined) == (12, 0)
    assert result.manifest.left_out == {"system_file": 13, "writer_file": 1, "not_included": 24}


def test_bad_images_among_images_bring_no_advice_about_patterns(tmp_path, small_models):
    with pytest.raises(QuarantineLimitError) as caught:
        score.run_score(config(small_models, write_images(tmp_path / "in", 5, bad=2), tmp_path / "out"))
    assert "--include" not in str(caught.value)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_what_is_left_out_is_said_by_each_view(tmp_path, small_models, place, request):
    source = crawled(tmp_path / "in")
    if place == "s3":
        uri = f"{request.getfixturevalue('s3_uri')}/in"
        for path in source.iterdir():
            open_store(uri).put(path.name, path.read_bytes())
        source = uri
    output = str(tmp_path / "out")
    arguments = ["score", str(source), output, "--model", "small@1", "--models-uri", small_models, "--runner", "local"]
    arguments += ["--exclude", "*.json", "--exclude", "*.html,unused"]
    said = "13 files of operating systems and tools, 1 file that a writer left (_SUCCESS, .keep), 24 files that --ex"
    dry = CliRunner().invoke(commands, [*arguments, "--dry-run"])
    assert f"Left out of INPUT: {said}clude names." in dry.output
    done = CliRunner().invoke(commands, arguments)
    assert f"Left out of INPUT: {said}clude names." in done.output
    assert all(word in done.output for word in ("left out of INPUT", "system_file", "writer_file", "excluded"))
    again = CliRunner().invoke(commands, arguments)
    assert "Already scored" in again.output
    assert "eft out" not in again.output
    shown = CliRunner().invoke(commands, ["runs", "show", f"{output}/model=small/version=1"])
    assert "left out of the input" in shown.output
    page = open_store(f"{output}/model=small/version=1").get("_report.html").decode()
    assert said in page
    assert "in the input, but no images to score" in page
    plan = json.loads(open_store(f"{output}/model=small/version=1").get("_plan-g0001.json"))
    assert plan["left_out"] == {"system_file": 13, "writer_file": 1, "excluded": 24}
    assert plan["frozen"]["exclude"] == ["*.json", "*.html", "unused"]


def test_new_files_that_are_left_out_owe_nothing(tmp_path, small_models):
    source = crawled(tmp_path / "in")
    settings = config(small_models, source, tmp_path / "out", include=["*.png"])
    score.run_score(settings)
    (source / "more.json").write_text("{}")
    (source / "Thumbs.db").write_bytes(b"x")
    again = score.run_score(settings)
    assert again.already_done
    (source / "new.png").write_bytes(image_bytes(99))
    third = score.run_score(settings).manifest
    assert (third.generation, third.scored, third.removed) == (2, 13, 0)
    assert third.left_out == {"system_file": 14, "writer_file": 1, "not_included": 25}


def test_a_run_that_was_planned_before_there_were_patterns_is_finished(tmp_path, small_models):
    settings = config(small_models, write_images(tmp_path / "in", 5), tmp_path / "out")
    score.run_score(settings)
    store = open_store(f"{tmp_path}/out/model=small/version=1")
    old = json.loads(store.get("_plan-g0001.json"))
    del old["left_out"]
    for name in ("include", "exclude", "follow_symlinks"):
        del old["frozen"][name]
    store.put("_plan-g0001.json", json.dumps(old).encode())
    for name in store.keys("_manifest"):
        store.delete(name)
    assert score.run_score(settings).manifest.scored == 5


def linked(tmp_path):
    """A folder of two images and of links to ten more outside, as Hugging Face's cache makes it, and a link to none."""
    blobs = write_images(tmp_path / "blobs", 12)
    snapshot = tmp_path / "snapshot"
    (snapshot / "deep").mkdir(parents=True)
    for number, path in enumerate(sorted(blobs.glob("*.png"))):
        if number < 2:
            path.rename(snapshot / path.name)
        else:
            (snapshot / "deep" / path.name).symlink_to(path)
    (snapshot / "gone.png").symlink_to(tmp_path / "none")
    return snapshot


def test_links_that_lead_outside_are_said_and_followed_when_asked(tmp_path, small_models, caplog):
    source = linked(tmp_path)
    plain = score.run_score(config(small_models, source, tmp_path / "plain"))
    assert (plain.manifest.scored, plain.manifest.left_out) == (2, {"link_outside": 10, "broken_link": 1})
    assert (
        "10 links that lead outside of INPUT (--follow-symlinks follows them), 1 link that leads nowhere" in caplog.text
    )
    with pytest.raises(ConfigError, match="Expected follow_symlinks=False"):
        score.run_score(config(small_models, source, tmp_path / "plain", follow_symlinks=True))
    settings = config(small_models, source, tmp_path / "followed", follow_symlinks=True, report=True)
    result = score.run_score(settings)
    assert (result.manifest.scored, result.manifest.left_out) == (12, {"broken_link": 1})
    uris = outputs.read(result.partition_uri)["uri"].to_pylist()
    assert all(uri.startswith(f"{source}/") for uri in uris)
    page = Partition(result.partition_uri).store.get("_report.html").decode()
    assert page.count("data:image/jpeg;base64") == min(result.manifest.flagged, len(result.manifest.top))
    assert score.run_score(settings).already_done
    target = next(tmp_path.glob("blobs/*.png"))
    target.write_bytes(image_bytes(1234))
    assert score.run_score(settings).manifest.generations[-1].superseded == 1


def test_a_folder_of_links_alone_says_why_nothing_is_there(tmp_path, small_models):
    (tmp_path / "only").mkdir()
    (tmp_path / "only/day1").symlink_to(write_images(tmp_path / "elsewhere", 3))
    with pytest.raises(
        NoImagesError, match=r"1 link that leads outside of INPUT .* Next: follow the links with --follow"
    ):
        score.run_score(config(small_models, tmp_path / "only", tmp_path / "out"))
    followed = config(small_models, tmp_path / "only", tmp_path / "out", follow_symlinks=True)
    assert score.run_score(followed).manifest.scored == 3


def test_patterns_that_take_nothing_are_named(tmp_path, small_models):
    source = write_images(tmp_path / "in", 3)
    with pytest.raises(NoImagesError, match=r"3 files that --include does not name\. Next: correct --include"):
        score.run_score(config(small_models, source, tmp_path / "out", include=["*.jpg"]))


def test_a_manifest_beside_its_links_is_read_through_them(tmp_path, small_models):
    source = linked(tmp_path)
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*.png") if path.exists())
    (source / "m.csv").write_text("uri\n" + "\n".join(names))
    with pytest.raises(
        AccessDeniedError, match="where the files are links that lead outside of it, add --follow-symlin"
    ):
        score.run_score(config(small_models, source / "m.csv", tmp_path / "denied"))
    settings = config(small_models, source / "m.csv", tmp_path / "out", max_quarantine_rate=1, shard_size=20)
    plain = score.run_score(settings).manifest
    assert (plain.scored, plain.codes) == (2, {"access_denied": 10})
    followed = config(small_models, source / "m.csv", tmp_path / "out2", follow_symlinks=True)
    assert score.run_score(followed).manifest.scored == 12
    with pytest.raises(ValueError, match="Expected follow_symlinks or allow_uris"):
        config(small_models, source / "m.csv", tmp_path / "out2", follow_symlinks=True, allow_uris=["/data"])
