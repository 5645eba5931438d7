"""The Ray runner against the local one, its oracle: equal bytes from folders and from S3, and the same errors."""

import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import write_images

from cnn_ray import outputs, score
from cnn_ray.artifact import load_artifact
from cnn_ray.config import ScoreConfig
from cnn_ray.errors import ArtifactError, UnavailableError
from cnn_ray.ray_runner import run_ray
from cnn_ray.ray_session import connected
from cnn_ray.storage import open_store

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def ray_session(s3_server: str) -> Iterator[None]:
    """One local Ray for these tests, whose workers see the S3 server of the tests."""
    with connected(num_cpus=3):
        yield


def config(models: str, source, output, runner: str, **changes) -> ScoreConfig:
    return ScoreConfig(
        model="small@1",
        models_uri=models,
        input_uri=str(source),
        output_uri=str(output),
        shard_size=8,
        runner=runner,
        max_quarantine_rate=0.2,
        **changes,
    )


def committed(output_uri: str) -> dict[str, bytes]:
    store = open_store(f"{output_uri}/model=small/version=1")
    return {key: store.get(key) for prefix in ("part-", "_quarantine/", "_plan") for key in store.keys(prefix)}


def upload(folder: Path, uri: str) -> str:
    store = open_store(uri)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return uri


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "in", 40, bad=3)


def test_prometheus_counts_what_was_committed(tmp_path, small_models, images):
    """First in this file: workers report some seconds late, and the counts of another run would be among these."""
    import ray

    manifest = score.run_score(config(small_models, images, tmp_path / "out", "ray")).manifest
    deadline = time.monotonic() + 60
    while sum((found := metrics(ray))[name] for name in ("scored", "quarantined")) < 43 and time.monotonic() < deadline:
        time.sleep(1)
    assert found["scored"] == manifest.scored == 40
    assert found["quarantined"] == manifest.quarantined == 3
    assert found["working"] > 0


def metrics(ray) -> Counter[str]:
    """Sums over all workers, from the page that Prometheus reads."""
    node = ray.nodes()[0]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as page:
        lines = page.read().decode().splitlines()
    found: Counter[str] = Counter()
    for line in lines:
        name, value = line.partition("{")[0], line.rpartition(" ")[2]
        if name in ("ray_cnn_ray_rows_scored_total", "ray_cnn_ray_rows_quarantined_total"):
            found[name.split("_")[4]] += int(float(value))
        elif name == "ray_cnn_ray_predictor_seconds_total" and 'state="working"' in line:
            found["working"] += float(value)  # type: ignore[assignment]
    return found


def test_local_and_ray_write_equal_bytes(tmp_path, small_models, images):
    one = score.run_score(config(small_models, images, tmp_path / "local", "local"))
    two = score.run_score(config(small_models, images, tmp_path / "ray", "ray"))
    assert committed(str(tmp_path / "local")) == committed(str(tmp_path / "ray"))
    assert (one.manifest.parts, one.manifest.quarantine) == (two.manifest.parts, two.manifest.quarantine)
    assert (one.manifest.runner, two.manifest.runner) == ("local", "ray")


def test_folder_and_s3_give_equal_rows_but_for_uri_and_etag(tmp_path, small_models, images, s3_uri, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models, source = upload(Path(small_models), f"{s3_uri}/models"), upload(images, f"{s3_uri}/in")
    local = score.run_score(config(small_models, images, tmp_path / "out", "local"))
    remote = score.run_score(config(models, source, f"{s3_uri}/local", "local"))
    by_ray = score.run_score(config(models, source, f"{s3_uri}/ray", "ray"))
    assert committed(f"{s3_uri}/local") == committed(f"{s3_uri}/ray")
    assert outputs.read(remote.partition_uri).equals(outputs.read(by_ray.partition_uri))
    a, b = outputs.read(local.partition_uri), outputs.read(remote.partition_uri)
    assert a.drop_columns(["uri", "etag"]).equals(b.drop_columns(["uri", "etag"]))
    assert [u.removeprefix(str(images)) for u in a["uri"].to_pylist()] == [
        u.removeprefix(source) for u in b["uri"].to_pylist()
    ]
    codes = [outputs.read_quarantine(r.partition_uri)["code"].to_pylist() for r in (local, remote, by_ray)]
    assert codes[0] == codes[1] == codes[2] == ["empty", "not_an_image", "truncated"]


def test_ray_resumes_what_local_began(tmp_path, small_models, images, monkeypatch):
    settings = config(small_models, images, tmp_path / "out", "local")
    whole = score.run_local

    def three_shards(context, shards, config):
        yield from whole(context, shards[:3], config)
        raise UnavailableError("Expected an answer. Received: none. Next: try again later.")

    monkeypatch.setattr(score, "run_local", three_shards)
    with pytest.raises(UnavailableError):
        score.run_score(settings)
    result = score.run_score(settings.model_copy(update={"runner": "ray"}))
    assert result.resumed_rows == 24
    monkeypatch.undo()
    score.run_score(config(small_models, images, tmp_path / "other", "local"))
    assert committed(str(tmp_path / "out")) == committed(str(tmp_path / "other"))


def test_an_error_of_a_stage_arrives_as_itself(tmp_path, small_models, images):
    import shutil

    models = shutil.copytree(small_models, tmp_path / "models")
    (models / "small/1/openvino/model.bin").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="other bytes"):  # raised while an actor is made
        score.run_score(config(str(models), images, tmp_path / "out", "ray"))
    page = next((tmp_path / "out/model=small/version=1/_plan").glob("*.parquet"))
    page.unlink()
    assert load_artifact(str(models), "small@1")
    with pytest.raises(Exception, match="Expected"):  # raised in a task
        score.run_score(config(small_models, images, tmp_path / "out", "ray"))


def test_run_ray_is_what_the_runner_ray_uses(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    settings = {"model": "m@1", "input_uri": "i", "output_uri": "o"}
    assert score.wants_ray(ScoreConfig(**settings))
    assert not score.wants_ray(ScoreConfig(**settings, runner="local"))
    monkeypatch.delenv("RAY_ADDRESS")
    assert not score.wants_ray(ScoreConfig(**settings))
    assert score.run_ray is run_ray


def test_links_that_lead_outside_are_read_on_workers_where_they_are_followed(tmp_path, small_models, images):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "day").symlink_to(images)
    (linked / "one.png").symlink_to(next(path for path in images.iterdir() if not path.name.startswith("bad-")))
    results = {}
    for runner in ("local", "ray"):
        settings = {"follow_symlinks": True, "exclude": ["*/bad-*"], "precision": "f32"}
        result = score.run_score(config(small_models, linked, tmp_path / runner, runner, **settings))
        assert (result.manifest.scored, result.manifest.quarantined) == (41, 0)
        assert result.manifest.left_out == {"excluded": 3}
        results[runner] = committed(str(tmp_path / runner))
    assert results["local"] == results["ray"]
