"""Charts: points where they belong, round ticks, and names from outside that stay text."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from cnn_ray.plots import BOTTOM, LEFT, RIGHT, TOP, Axis, Series, axis_of, chart, heat_table, number_text

HOSTILE = '"><script>alert(1)</script>'
UNIT_X, UNIT_Y = Axis("x", 0, 1), Axis("y", 0, 1)


def drawn(*series: Series, x: Axis = UNIT_X, y: Axis = UNIT_Y, diagonal: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{chart('Chart', series, x, y, diagonal=diagonal)}</div>")  # noqa: S314 - our own text


def test_points_lie_where_their_numbers_say():
    line = drawn(Series("a", [(0, 0), (0.5, 1), (1, 0.5)])).find("svg/polyline")
    middle = (LEFT + RIGHT) / 2
    assert line is not None
    assert line.get("points") == f"{LEFT:.1f},{BOTTOM:.1f} {middle:.1f},{TOP:.1f} {RIGHT:.1f},{(TOP + BOTTOM) / 2:.1f}"


def test_values_beyond_the_axis_stay_at_its_end():
    dot = drawn(Series("a", [(7, -3)], "dots")).find("svg/circle")
    assert dot is not None
    assert (float(dot.get("cx", "")), float(dot.get("cy", ""))) == (RIGHT, BOTTOM)


def test_a_logarithmic_axis_has_powers_of_ten_at_equal_distances():
    axis = Axis("cost", 1, 1000, log=True)
    assert axis.ticks() == [1, 10, 100, 1000]
    assert [axis.share(v) for v in (1, 10, 100, 1000, 0)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 0])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.93, 0.97), (-3, 8), (0, 1234567), (5, 5)])
def test_ticks_are_few_and_inside(low, high):
    ticks = Axis("y", low, high).ticks()
    assert 1 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


@pytest.mark.parametrize("values", [[], [math.nan, math.inf], [2.0], [0.0, 0.0]])
def test_an_axis_of_odd_values_has_room(values):
    for log in (False, True):
        axis = axis_of("y", values, log=log)
        assert math.isfinite(axis.low)
        assert axis.low < axis.high


def test_a_point_without_a_number_is_left_out_and_takes_its_label_along():
    points = [(0.2, math.nan), (0.4, 0.5)]
    found = drawn(Series("a", points, "dots", ["lost", "kept"]))
    assert len(found.findall("svg/circle")) == 1
    texts = [one.text for one in found.findall("svg/text")]
    assert "kept" in texts
    assert "lost" not in texts


def test_the_diagonal_and_the_spoken_title():
    assert drawn(Series("a", [])).find("svg/line[@class='threshold']") is None
    found = drawn(Series("a", []), Series("b", []), diagonal=True)
    assert found.find("svg/line[@class='threshold']") is not None
    picture = found.find("svg")
    assert picture is not None
    assert (picture.get("role"), picture.get("aria-label")) == ("img", "Chart: a, b")


def test_names_from_outside_stay_text():
    named = Series(HOSTILE, [(0.5, 0.5)], "dots", [HOSTILE])
    page = chart(HOSTILE, [named], Axis(HOSTILE, 0, 1), Axis(HOSTILE, 0, 1)) + heat_table([HOSTILE], [[1]])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    ElementTree.fromstring(f"<div>{page}</div>")  # noqa: S314 - our own text


def test_shades_of_a_confusion_matrix_are_shares_of_the_row():
    page = heat_table(["a", "b"], [[3, 1], [0, 0]])
    assert re.findall(r"--share:([0-9.]+)", page) == ["0.750", "0.250", "0.000", "0.000"]


def test_numbers_are_short():
    assert [number_text(v) for v in (0.25, 20, 3000, 25_000_000, 2e9)] == ["0.25", "20", "3k", "25M", "2G"]
