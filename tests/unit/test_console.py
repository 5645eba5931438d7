"""Progress: the recent rate, the time left after a resume, log lines where there is no terminal, 80 columns on one."""

import io

import pytest
from rich.console import Console

from cnn_ray.console import RecentRate, RowProgress, print_report


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def printed(console: Console) -> list[str]:
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue().splitlines()


def test_rate_begins_with_the_first_count_so_a_resume_does_not_fool_it():
    rate = RecentRate()
    rate.add(0, 900_000)
    assert rate.per_s(1) is None
    rate.add(10, 900_500)
    assert rate.per_s(10) == pytest.approx(50)


def test_rate_is_the_recent_one():
    rate = RecentRate()
    done = 0
    for second in range(0, 600, 5):
        done += 500 if second < 300 else 50
        rate.add(second, done)
    assert rate.per_s(595) == pytest.approx(10)


def test_rate_falls_in_a_stall_but_not_between_two_shards():
    rate = RecentRate()
    for second in (0, 5, 10):
        rate.add(second, 100 * second)
    assert rate.per_s(15) == pytest.approx(100)
    assert rate.per_s(105) == pytest.approx(10)


def test_lines_every_five_seconds_and_a_last_one_where_no_terminal_is():
    console, clock = plain(), Clock()
    with RowProgress("scored", console, clock) as bar:
        bar.update(9_000, 10_000, 4)
        for _ in range(10):
            clock.now_s += 1
            bar.update(bar._state[0] + 100, 10_000, 5)
    assert printed(console) == [
        "scored: 9,000/10,000, 4 quarantined",
        "scored: 9,500/10,000, 100 images/s, 5 quarantined, 0:00:05 left",
        "scored: 10,000/10,000, 100 images/s, 5 quarantined",
    ]


def test_the_last_line_comes_also_where_a_run_ends_early():
    console, clock = plain(), Clock()

    def interrupted():
        with RowProgress("scored", console, clock) as bar:
            bar.update(0, 100)
            clock.now_s += 2
            bar.update(8, 100)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert printed(console) == ["scored: 0/100", "scored: 8/100, 4.0 images/s, 0:00:23 left"]


def test_a_terminal_of_80_columns_shows_everything_in_one_line():
    console, clock = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None), Clock()
    with RowProgress("scored", console, clock) as bar:
        bar.update(0, 10_000_000, 0)
        clock.now_s += 10
        bar.update(1_234_567, 10_000_000, 12_345)
    last = [line for line in printed(console) if "left" in line][-1]
    assert "1,234,567/10,000,000, 123,457 images/s, 12,345 quarantined, 0:01:11 left" in last
    assert len(last.split("\r")[-1].rstrip()) <= 90  # with control codes


def test_a_path_is_said_whole():
    console = plain()
    print_report("/a/[bold]" + "long" * 40 + "/report.html", console)
    assert printed(console) == ["Report: /a/[bold]" + "long" * 40 + "/report.html"]
