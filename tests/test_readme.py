"""README, constraints and example configurations say what the code does."""

import inspect
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from cnn_ray import cli, errors
from cnn_ray.config import CompareConfig, NightlyConfig, ScoreConfig, TrainConfig, build_config, load_yaml
from cnn_ray.records import QuarantineCode

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    return [c.strip() for c in re.split(r"[\n;]|&&", blocks) if re.match(r"\s*(\.venv/bin/)?cnn-ray ", c)]


def test_readme_shows_commands():
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_every_command_of_readme_exists_with_its_flags(command):
    words = shlex.split(command, comments=True)[1:]
    current: click.Command = cli.commands
    while words and isinstance(current, click.Group) and not words[0].startswith("-"):
        assert words[0] in current.commands, f"no command {words[0]}"
        current = current.commands[words.pop(0)]
    known = {flag for p in current.params for flag in p.opts}
    assert {w for w in words if w.startswith("--")} <= known


def test_every_exit_code_and_quarantine_code_is_in_readme():
    codes = {k.exit_code for _, k in inspect.getmembers(errors, inspect.isclass) if issubclass(k, errors.CnnRayError)}
    assert codes | {0} == {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert all(f"`{code}`" in README for code in QuarantineCode)


def test_constraints_pin_every_dependency_and_name_no_host():
    text = (ROOT / "constraints.txt").read_text()
    pinned = set(re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[\[~<>=!; ]", requirement)[0].lower() for requirement in wanted}
    assert names <= pinned
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_example_configurations_load(path):
    if path.name == "serve.yaml" or path.name.startswith("kubernetes_"):
        return  # tests/unit/test_doctor_yaml.py, test_schedule.py and tests/contract/test_ray_kubernetes.py load them
    kind = {"score": ScoreConfig, "compare": CompareConfig, "nightly": NightlyConfig}.get(
        re.split(r"[_.]", path.name)[0], TrainConfig
    )
    flags = {"date": "2026-11-23"} if kind is ScoreConfig else {}
    config = build_config(kind, load_yaml(path), flags, source=path.name)
    if isinstance(config, CompareConfig):
        assert all(config.training(variant, seed) for variant in config.variants for seed in config.seeds)
