"""Which version answers: aliases followed live, the canary's stable share, versions loaded on demand and forgotten."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from cnn_ray import served_models
from cnn_ray.artifact import set_alias
from cnn_ray.config import ServeConfig
from cnn_ray.errors import ArtifactError
from cnn_ray.served_models import ServedModels


@pytest.fixture
def models_uri(small_models: str, tmp_path: Path) -> str:
    """small@1 to small@4, the same net; champion is 1, candidate 2."""
    for version in (1, 2, 3, 4):
        shutil.copytree(Path(small_models) / "small" / "1", tmp_path / "small" / str(version))
        description = tmp_path / "small" / str(version) / "artifact.json"
        description.write_text(json.dumps(json.loads(description.read_text()) | {"version": version}))
    for alias, version in (("champion", 1), ("candidate", 2)):
        set_alias(str(tmp_path), "small", alias, version)
    return str(tmp_path)


def loaded(models_uri: str, **settings: object) -> ServedModels:
    config = {"model": "small@champion", "models_uri": models_uri, "precision": "f32", "alias_poll_s": 0.01, **settings}
    models = ServedModels(ServeConfig.model_validate(config), observe=lambda rows, seconds, name, version: None)
    models.load()
    return models


def in_memory(models: ServedModels) -> list[int]:
    return [model.artifact.version for model in models.loaded]


def test_an_alias_is_followed_and_the_old_version_finishes_what_it_has(models_uri):
    async def run():
        models = loaded(models_uri)
        before = await models.get("small", models.version_of("small"))
        answer = asyncio.create_task(before.batcher.scores([np.zeros((32, 32, 3), np.uint8)] * 8))
        await asyncio.sleep(0)
        set_alias(models_uri, "small", "champion", 3)
        await models.follow()
        return models, before, await answer

    models, before, scores = asyncio.run(run())

    assert models.version_of("small") == 3
    assert models.peek("small", 3).artifact.version == 3, "warm before it answers"
    assert (before.artifact.version, scores.shape) == (1, (8, 2))


def test_a_new_version_that_cannot_be_loaded_leaves_the_old_one(models_uri, caplog):
    async def run():
        models = loaded(models_uri)
        set_alias(models_uri, "small", "champion", 3)
        (Path(models_uri) / "small" / "3" / "openvino" / "model.bin").write_bytes(b"damaged")
        await models.follow()
        await models.follow()
        meant = models.version_of("small")
        set_alias(models_uri, "small", "champion", 4)
        await models.follow()
        return meant, models.version_of("small")

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(run()) == (1, 4)
    told = [record.message for record in caplog.records if "the old versions stay" in record.message]
    assert len(told) == 1, "once, not at every poll"


def damage(models_uri: str, version: int) -> None:
    (Path(models_uri) / "small" / str(version) / "openvino" / "model.bin").write_bytes(b"damaged")


def test_a_damaged_version_is_named_until_it_is_repaired(models_uri, monkeypatch):
    monkeypatch.setattr(served_models, "RETRY_FAILED_S", 0)
    weights = Path(models_uri) / "small" / "3" / "openvino" / "model.bin"
    whole = weights.read_bytes()

    async def run():
        models = loaded(models_uri)
        set_alias(models_uri, "small", "champion", 3)
        damage(models_uri, 3)
        await models.follow()
        seen = [(dict(models.failed("small")), models.version_of("small"))]
        weights.write_bytes(whole)
        await models.follow()
        return [*seen, (dict(models.failed("small")), models.version_of("small"))]

    (first, meant), after = asyncio.run(run())

    assert (list(first), meant) == ([("small", 3)], 1)
    assert "other bytes in openvino/model.bin" in str(first["small", 3])
    assert after == ({}, 3)


def test_a_damaged_version_is_forgotten_when_the_alias_goes_back(models_uri):
    async def run():
        models = loaded(models_uri)
        set_alias(models_uri, "small", "champion", 3)
        damage(models_uri, 3)
        await models.follow()
        set_alias(models_uri, "small", "champion", 1)
        await models.follow()
        return models.failed(), models.version_of("small")

    assert asyncio.run(run()) == ({}, 1)


def test_a_damaged_version_is_not_read_at_every_poll(models_uri, monkeypatch):
    read: list[int] = []
    load = ServedModels._load

    def counting(self, name, version):
        read.append(version)
        return load(self, name, version)

    monkeypatch.setattr(ServedModels, "_load", counting)

    async def run():
        models = loaded(models_uri)
        set_alias(models_uri, "small", "champion", 3)
        damage(models_uri, 3)
        for _ in range(5):
            await models.follow()
            assert list(models.failed()) == [("small", 3)]

    asyncio.run(run())

    assert read == [1, 3]


def test_while_a_new_version_loads_the_old_one_answers(models_uri, monkeypatch):
    async def run():
        models = loaded(models_uri)
        set_alias(models_uri, "small", "champion", 3)
        following = asyncio.create_task(models.follow())
        meant = set()
        while not following.done():
            meant.add((models.version_of("small"), models.peek("small", models.version_of("small")) is not None))
            await asyncio.sleep(0)
        return meant

    assert asyncio.run(run()) <= {(1, True), (3, True)}


def test_one_damaged_alias_does_not_hold_the_others_back(models_uri):
    async def run():
        models = loaded(models_uri, canary="candidate", canary_percent=10)
        damage(models_uri, 3)
        set_alias(models_uri, "small", "candidate", 3)
        set_alias(models_uri, "small", "champion", 4)
        set_alias(models_uri, "small", "third", 1)
        await models.follow()
        return [models.version_of("small", name) for name in (None, "champion", "candidate", "third")]

    assert asyncio.run(run()) == [4, 4, 2, 1]


def test_aliases_that_cannot_be_read_for_a_while_change_nothing(models_uri):
    async def run():
        models = loaded(models_uri)
        (Path(models_uri) / "small" / "aliases.json").write_text("{")
        await models.follow()
        return models.version_of("small"), models.version_of("small", "candidate")

    assert asyncio.run(run()) == (1, 2)


def test_the_canary_gets_its_share_and_the_same_bytes_the_same_version(models_uri):
    models = loaded(models_uri, canary="candidate", canary_percent=20)
    bodies = [str(number).encode() for number in range(5000)]

    versions = [models.canary_version("small", body) for body in bodies]

    assert versions == [models.canary_version("small", body) for body in bodies]
    assert set(versions) == {1, 2}
    assert 0.18 < versions.count(2) / len(versions) < 0.22
    assert sorted(in_memory(models)) == [1, 2], "the canary is warm too"
    more = loaded(models_uri, canary="candidate", canary_percent=50)
    assert all(more.canary_version("small", body) == 2 for body, v in zip(bodies, versions, strict=True) if v == 2), (
        "who was in the canary stays there when it grows"
    )


def test_a_canary_without_an_alias_sends_nobody_anywhere(models_uri):
    models = loaded(models_uri, canary="nobody", canary_percent=50)

    assert {models.canary_version("small", bytes([n])) for n in range(100)} == {1}


def test_versions_are_loaded_on_demand_and_the_least_recently_used_goes(models_uri):
    async def run():
        models = loaded(models_uri, max_loaded_models=3)
        seen = []
        for version in (2, 3, 2, 4):
            await models.get("small", version)
            seen.append(in_memory(models))
        return models, seen, await models.get("small", 9), await models.get("other", 1)

    _, seen, missing, other = asyncio.run(run())

    assert seen == [[1, 2], [1, 2, 3], [1, 3, 2], [1, 2, 4]]
    assert missing is None
    assert other is None


def test_many_who_ask_for_one_version_load_it_once(models_uri, monkeypatch):
    loads: list[str] = []
    real = served_models.load_artifact
    monkeypatch.setattr(served_models, "load_artifact", lambda uri, ref: loads.append(ref) or real(uri, ref))

    async def run():
        models = loaded(models_uri)
        return await asyncio.gather(*(models.get("small", 2) for _ in range(10)))

    found = asyncio.run(run())

    assert loads == ["small@1", "small@2"]
    assert len({id(model) for model in found}) == 1


def test_a_reference_that_means_nothing_is_told_at_the_start(models_uri):
    with pytest.raises(ArtifactError, match="Expected an alias of model small"):
        loaded(models_uri, model="small@nobody")
