"""Flags of lists: commas, several occurrences, and values that hold a comma themselves."""

from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner

from cnn_ray.cli import commands


def shown(*arguments: str) -> dict:
    result = CliRunner().invoke(commands, [*arguments, "--print-config"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return yaml.safe_load(result.output)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["b@1,c@1"], ["b@1", "c@1"]),
        (["b@1", "c@1"], ["b@1", "c@1"]),
        (["b@1,c@2", "d@champion"], ["b@1", "c@2", "d@champion"]),
        ([" b@1 , c@1 "], ["b@1", "c@1"]),
        ([""], []),
    ],
)
def test_a_list_is_given_with_commas_or_flag_by_flag(given, expected):
    flags = [part for value in given for part in ("--also", value)]

    assert shown("serve", "--model", "a@1", *flags)["also"] == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (['"phishing, bank",benign'], ["phishing, bank", "benign"]),
        (['"phishing, bank"', "benign"], ["phishing, bank", "benign"]),
        (['"a ""b"", c",d'], ['a "b", c', "d"]),
        (['5" screen,d'], ['5" screen', "d"]),
        (["it's,d"], ["it's", "d"]),
        (["été,日本"], ["été", "日本"]),
    ],
)
def test_a_value_may_hold_a_comma(given, expected):
    flags = [part for value in given for part in ("--data-labels", value)]

    assert shown("train", "--name", "x", "--data-uri", "d", *flags)["data"]["labels"] == expected


def test_every_list_flag_works_so():
    assert shown("score", "a", "b", "--model", "m@1", "--allow-uris", "s3://x", "--allow-uris", "s3://y,/z")[
        "allow_uris"
    ] == ["s3://x", "s3://y", "/z"]
    assert shown("train", "--name", "x", "--data-uri", "d", "--allow", "label_leakage", "--allow", "class_imbalance")[
        "allow"
    ] == ["label_leakage", "class_imbalance"]


@pytest.mark.parametrize("given", ["b@1,,c@1", "b@1,", ",", '"b@1', '"b@1"x', "b@1\nc@1,"])
def test_half_written_lists_are_refused(given):
    result = CliRunner().invoke(commands, ["serve", "--model", "a@1", "--also", given])

    assert result.exit_code == 2
    assert "Expected values between commas, one with a comma in double quotes. Received:" in result.output
