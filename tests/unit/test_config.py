import pytest
import yaml
from click.testing import CliRunner

from cnn_ray.cli import commands
from cnn_ray.config import Config, NightlyConfig, ScoreConfig, ServeConfig, TrainConfig, build_config, load_yaml
from cnn_ray.errors import ConfigError

SCORE = {"input_uri": "in", "output_uri": "out", "model": "phishing@3"}


@pytest.mark.parametrize("kind", [ScoreConfig, TrainConfig, ServeConfig, NightlyConfig])
def test_every_field_is_documented(kind):
    def check(config: type[Config]) -> None:
        for name, field in config.model_fields.items():
            assert field.description, f"{config.__name__}.{name} has no docstring"

    check(kind)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Received: bach_size\. Next: did you mean batch_size\?"):
        build_config(ScoreConfig, SCORE, {"bach_size": 3})
    with pytest.raises(ConfigError, match=r"data\.grop_column\. Next: did you mean group_column\?"):
        build_config(TrainConfig, {"name": "x", "data": {"uri": "d", "grop_column": "g"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "phishing"}, "NAME@VERSION"),
        ({"model": "../x@1"}, "NAME@VERSION"),
        ({"date": "2026-13-01"}, "date"),
        ({"date": "20261101"}, "Expected a date like"),
        ({"input_uri": "s3://b/{date}"}, "Expected --date"),
        ({"input_uri": "s3://b/{month}"}, "Expected --date, because the input holds {month}"),
        ({"input_uri": "s3://b/{hour}"}, "Expected {date}, {year}, {month}, {day} in INPUT.* Received: {hour}"),
        ({"input_uri": "s3://b/{date"}, "written twice .* Received: {"),
        ({"input_uri": "s3://b/date}"}, "written twice .* Received: }"),
        ({"input_uri": "s3://b/{}"}, "Received: {}"),
        ({"input_uri": "s3://b/{Date}", "date": "2026-11-01"}, "Received: {Date}"),
        ({"output_uri": "out/{date}", "date": "2026-11-01"}, "Expected OUTPUT without {date}"),
        ({"shard_size": -1}, "shard_size"),
        ({"max_quarantine_rate": 2}, "max_quarantine_rate"),
        ({"runner": "spark"}, "runner"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_config(ScoreConfig, SCORE, change)
    assert "Expected" in str(caught.value)
    assert "Next:" in str(caught.value)


def test_flag_wins_over_file_wins_over_default(tmp_path):
    file = tmp_path / "score.yaml"
    file.write_text(yaml.safe_dump({**SCORE, "batch_size": 8, "shard_size": 64}))
    arguments = ["score", "--config", str(file), "--batch-size", "16", "--print-config"]
    result = CliRunner().invoke(commands, arguments, catch_exceptions=False)
    shown = yaml.safe_load(result.output)
    assert (shown["batch_size"], shown["shard_size"], shown["lease_s"]) == (16, 64, 60)


def test_nested_flags(tmp_path):
    arguments = [
        "train",
        "--name",
        "m",
        "--data-uri",
        "d",
        "--model-dropout",
        "0.3",
        "--data-labels",
        "a, b",
        "--print-config",
    ]
    shown = yaml.safe_load(CliRunner().invoke(commands, arguments, catch_exceptions=False).output)
    assert shown["data"]["uri"] == "d"
    assert shown["data"]["labels"] == ["a", "b"]
    assert shown["model"]["dropout"] == 0.3


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match="Expected"):
        load_yaml(tmp_path / "x.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(tmp_path / "x.yaml")


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        build_config(ScoreConfig, SCORE).batch_size = 3  # type: ignore[misc]
