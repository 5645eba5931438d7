"""The report: what it says, that nothing from outside is more than text in it, and that it never ends a run."""

import logging
import shutil
import subprocess
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import pytest
from factories import image_bytes, write_images
from PIL import Image

from cnn_ray import report
from cnn_ray.charts import commit_rates
from cnn_ray.comparison import Night, chance_psi, compare, percent
from cnn_ray.config import ScoreConfig
from cnn_ray.manifests import FORMAT, Manifest
from cnn_ray.outputs import Partition
from cnn_ray.partitions import partition_uri
from cnn_ray.report import ReportData, build_report, previous_night, write_report
from cnn_ray.storage import open_store
from cnn_ray.tallies import SCORE_BINS, TOP_ROWS, BadRow, TopRow

HOSTILE = (
    "<img src=x onerror=alert(1)>.png",
    '"><script>alert(1)</script>.png',
    "' onmouseover='alert(1)",
    "</style><base href=http://evil.example>",
    "<!--",
    "]]>&lt;b&gt;",
)
BINS = (900, *[5] * (SCORE_BINS - 2), 10)
TEXT_TAGS = "html head meta title style body main header h1 h2 span div p b dl dt dd small section ul li i br img"
DRAWN_TAGS = "table thead tbody tr th td svg rect line polyline polygon text"


class Page(HTMLParser):
    """All tags with their attributes, the texts, and the tags that are open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def night(**changed) -> Night:
    facts = {
        "model": "shots",
        "version": 3,
        "generation": 1,
        "status": "complete",
        "planned": 1010,
        "scored": 1000,
        "quarantined": 10,
        "flagged": 40,
        "labels": {"legitimate": 960, "phishing": 40},
        "codes": {"empty": 10},
        "score_bins": BINS,
        "top": (TopRow(uri="s3://in/a.png", etag="e", label="phishing", score=0.99),),
        "bad": (BadRow(uri="s3://in/b.png", code="empty", detail="0 bytes"),),
    }
    return Night.model_validate({**facts, **changed})


def times(base: Night, factor: int, **changed) -> Night:
    many = {name: getattr(base, name) * factor for name in ("planned", "scored", "quarantined", "flagged")}
    many["labels"] = {label: count * factor for label, count in base.labels.items()}
    many["score_bins"] = tuple(count * factor for count in base.score_bins)
    return base.model_copy(update={**many, **changed})


def data(**changed) -> ReportData:
    return ReportData(**{"night": night(), "partition_uri": "s3://out/x", "positive_label": "phishing", **changed})


def levels(before: Night, now: Night) -> dict[str, str]:
    return {change.what: change.level for change in compare(before, now)}


def test_what_comes_from_outside_is_text_and_nothing_else():
    rows = tuple(TopRow(uri=name, etag=name, label=name, score=0.9) for name in HOSTILE)
    bad = tuple(BadRow(uri=name, code="empty", detail=name) for name in HOSTILE)
    hostile = night(top=rows, bad=bad, labels=dict.fromkeys(HOSTILE, 5), runner=HOSTILE[0], started_at=HOSTILE[1])
    source = build_report(
        data(
            night=hostile,
            previous=hostile.model_copy(update={"labels": {}}),
            previous_date=HOSTILE[0],
            partition_uri=HOSTILE[1],
            date=HOSTILE[0],
            positive_label=HOSTILE[0],
            thumbnails={HOSTILE[0]: b"jpeg", HOSTILE[1]: HOSTILE[1]},
            config={HOSTILE[0]: HOSTILE},
            timeline=[(0.0, 0), (1.0, 10)],
        )
    )
    page = Page(source)
    assert not page.open
    assert {tag for tag, _ in page.tags} <= {*TEXT_TAGS.split(), *DRAWN_TAGS.split()}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "xlink:href", "srcset")]
        if "src" in attributes:
            assert tag == "img"
            assert (attributes["src"] or "").startswith("data:image/jpeg;base64,")
            assert attributes["alt"]
        assert tag != "style" or not attributes
        assert set((attributes.get("style") or "width:0%").replace("width:", "").rstrip("%")) <= set("0123456789.")
    for name in HOSTILE:
        assert name in page.text
    assert "http" not in source.replace("http-equiv", "").replace("http://evil.example", "")


def test_policy_forbids_everything_but_the_own_style_and_pictures():
    page = Page(build_report(data()))
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert policies[0]
    assert policies[0].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    style = (Path(report.__file__).parent / "report.css").read_text()
    assert "url(" not in style
    assert "@import" not in style


def test_characters_that_hide_a_name_are_spelled_out():
    source = build_report(data(night=night(top=(TopRow(uri="a\u202egnp.exe\x1b\n", etag="", label="x", score=1),))))
    assert "a\\u202egnp.exe\\u001b\\u000a" in source
    assert "\u202e" not in source


def test_the_page_stays_below_a_megabyte_whatever_is_in_it():
    long = '"' * 100_000
    worst = night(
        top=tuple(TopRow(uri=f"{k}{long}", etag="", label=long, score=1) for k in range(TOP_ROWS)),
        bad=tuple(BadRow(uri=f"{k}{long}", code=f"c{k % 11}", detail=long) for k in range(33)),
        codes={f"c{k}": 1 for k in range(11)},
        labels={f"{k}{long}": 1 for k in range(500)},
    )
    pictures = {row.uri: bytes(report.MOST_JPEG_BYTES) for row in worst.top}
    config = dict.fromkeys(ScoreConfig.model_fields, long)
    timeline = [(float(k), 256 * k) for k in range(40_000)]
    source = build_report(data(night=worst, previous=worst, thumbnails=pictures, config=config, timeline=timeline))
    assert len(source.encode()) < 1_000_000


def test_headline_and_sections():
    page = Page(build_report(data(date="2026-11-24")))
    assert [tag for tag, _ in page.tags].count("h1") == 1
    for said in ("shots@3 · 2026-11-24", "complete", "1,010", "1,000", "4.00% of scored", "s3://in/b.png", "0 bytes"):
        assert said in page.texts, said
    assert "1 of 40 flagged screenshots." in page.texts
    assert "No earlier night of this model was found." in page.texts
    assert "Warning" not in page.texts


def test_a_run_over_the_quarantine_limit_says_so_in_words():
    over = night(status="quarantine_limit", quarantined=300, planned=1300)
    page = Page(build_report(data(night=over, config={"max_quarantine_rate": 0.05})))
    assert "Warning" in page.texts
    assert "300 of 1,300 screenshots (23.1%) could not be read. Allowed are 5.00%." in page.text
    assert "Readers refuse this run" in page.text


def test_accepted_and_removed_rows_are_told():
    page = Page(build_report(data(night=night(accepted=7, removed=12))))
    assert "Somebody accepted 7 unreadable screenshots of this run as they are." in page.texts
    assert "no longer in the input" in page.texts


def test_an_equal_night_is_no_news():
    assert set(levels(night(), night()).values()) == {"same"}
    assert not [change.sentence for change in compare(night(), night()) if change.sentence]


def test_jumps_are_warnings_in_words():
    before = times(night(), 100)
    after = times(
        night(),
        100,
        score_bins=(50_000, *[2_500] * (SCORE_BINS - 1)),
        quarantined=4_000,
        flagged=9_000,
        labels={"legitimate": 91_000, "phishing": 9_000},
    )
    found = levels(before, after)
    assert {what for what, level in found.items() if level == "warning"} == {
        "PSI of scores",
        "quarantined",
        "flagged",
        "label legitimate",
        "label phishing",
    }
    page = Page(build_report(data(night=after, previous=before, previous_date="2026-11-23")))
    assert "The share of label phishing rose from 4.00% to 9.00%, more than chance explains." in page.text
    assert "another shape" in page.text
    assert "Compared with 2026-11-23" in page.texts


def test_a_mild_shift_is_a_note():
    before = times(night(), 1000)
    mild = (780_000, *[11_500] * (SCORE_BINS - 2), 13_000)
    change = compare(before, before.model_copy(update={"score_bins": mild}))[0]
    assert change.level == "note"
    assert 0.1 <= float(change.difference) < 0.25


def test_few_rows_make_no_warning_of_chance():
    few = {"planned": 20, "scored": 20, "quarantined": 0}
    before = night(**few, flagged=1, labels={"a": 19, "b": 1}, score_bins=(19, *[0] * (SCORE_BINS - 2), 1))
    after = night(**few, flagged=3, labels={"a": 17, "b": 3}, score_bins=(15, 2, *[0] * (SCORE_BINS - 3), 3))
    assert chance_psi(20, 20) > 3
    assert levels(before, after)["PSI of scores"] == "note"
    assert "warning" not in levels(before, after).values()


def test_a_rare_label_that_doubles_is_a_warning_but_less_quarantine_is_none():
    before = times(night(), 100, labels={"legitimate": 99_600, "phishing": 400}, flagged=400, quarantined=5_000)
    after = times(night(), 100, labels={"legitimate": 99_200, "phishing": 800}, flagged=800, quarantined=1_000)
    found = levels(before, after)
    assert found["label phishing"] == found["flagged"] == "warning"
    assert found["quarantined"] == "note"


def test_volume():
    assert levels(night(), night(planned=1300))["planned rows"] == "note"
    assert levels(night(), night(planned=2100))["planned rows"] == "warning"
    assert levels(night(), night(planned=400))["planned rows"] == "warning"
    assert levels(night(planned=0, scored=0), night())["planned rows"] == "same"


def test_shares_for_people():
    assert [percent(share) for share in (0, 0.5, 0.0123, 0.00042)] == ["0.0%", "50.0%", "1.23%", "0.0420%"]


def test_commits_at_one_moment_make_no_curve_and_no_error():
    page = Page(build_report(data(timeline=[(3.0, 0), (3.0, 256), (3.0, 512)])))
    assert "Too few commits for a curve." in page.texts
    page = Page(build_report(data(timeline=[(0.0, 512), (9.0, 512)])))
    assert "Mean 0 images/s over 9 s. 512 rows came from earlier attempts." in page.texts


def test_throughput_is_the_rate_between_commits_and_bounded():
    assert commit_rates([(0, 0)]) == []
    assert commit_rates([(0, 1000), (10, 1500), (20, 1600)]) == [(0, 10, 50), (10, 20, 10)]
    many = [(float(k), 100 * k) for k in range(100_000)]
    rates = commit_rates(many)
    assert 50 <= len(rates) <= 61
    assert sum((b - a) * rate for a, b, rate in rates) == pytest.approx(100 * 99_999)


# ---- what is gathered


def manifest(**changed) -> Manifest:
    files = {"parts": (), "quarantine": (), "superseded": (), "generations": (), "format": FORMAT}
    strings = dict.fromkeys(("model_digest", "engine", "precision", "runner", "started_at", "finished_at"), "x")
    model = {"label_names": ("legitimate", "phishing"), "positive_label": "phishing", "threshold": 0.5}
    return Manifest(**{**night().model_dump(), **files, **strings, **model, "config": {"model": "shots@3"}, **changed})


def put_manifest(out: Path, day: str, version: int, generation: int = 1, **changed) -> None:
    partition = Partition(partition_uri(str(out), date.fromisoformat(day), "shots", version))
    partition.write_manifest(manifest(version=version, generation=generation, **changed))


def found(out: Path, day: str = "2026-11-24", version: int = 3):
    earlier = previous_night(str(out), date.fromisoformat(day), "shots", version)
    return earlier and (earlier.date.isoformat(), earlier.manifest.version, earlier.manifest.generation)


def test_the_previous_night_is_the_nearest_complete_one_of_the_same_version_first(tmp_path):
    assert found(tmp_path) is None
    assert previous_night(str(tmp_path), None, "shots", 3) is None
    put_manifest(tmp_path, "2026-11-25", 3)
    put_manifest(tmp_path, "2026-09-01", 3)
    assert found(tmp_path) is None
    put_manifest(tmp_path, "2026-11-20", 3)
    assert found(tmp_path) == ("2026-11-20", 3, 1)
    put_manifest(tmp_path, "2026-11-22", 2)
    put_manifest(tmp_path, "2026-11-22", 1)
    assert found(tmp_path) == ("2026-11-22", 2, 1)
    put_manifest(tmp_path, "2026-11-22", 4)
    assert found(tmp_path) == ("2026-11-22", 4, 1)
    put_manifest(tmp_path, "2026-11-22", 3)
    put_manifest(tmp_path, "2026-11-22", 3, 2)
    assert found(tmp_path) == ("2026-11-22", 3, 2)
    put_manifest(tmp_path, "2026-11-22", 3, 3, status="quarantine_limit")
    assert found(tmp_path) == ("2026-11-22", 3, 2)


def test_a_manifest_that_cannot_be_read_is_passed_over(tmp_path, caplog):
    put_manifest(tmp_path, "2026-11-20", 3)
    broken = Partition(partition_uri(str(tmp_path), date(2026, 11, 23), "shots", 3))
    broken.store.put("_manifest-g0001.json", b"{}")
    assert found(tmp_path) == ("2026-11-20", 3, 1)
    assert "_manifest-g0001.json" in caplog.text


def run_of(tmp_path: Path, rows: int) -> tuple[ScoreConfig, Manifest, Partition]:
    images = write_images(tmp_path / "in", rows)
    (images / "wide.png").write_bytes(image_bytes(99, (1600, 400)))
    listed = [row for table in open_store(str(images)).list() for row in table.to_pylist()]
    top = tuple(TopRow(uri=row["uri"], etag=row["etag"], label="phishing", score=0.9) for row in listed)
    config = ScoreConfig(model="shots@3", input_uri=str(images), output_uri=str(tmp_path / "out"))
    full = manifest(top=top)
    return config, full, Partition(partition_uri(str(tmp_path / "out"), None, "shots", 3))


def test_report_of_a_run_holds_small_pictures_of_what_was_scored(tmp_path, small_artifact):
    config, full, partition = run_of(tmp_path, 3)
    Path(full.top[0].uri).unlink()
    Path(full.top[1].uri).write_bytes(image_bytes(7))
    write_report(partition, full, timeline=[(0, 0), (2, 4)], wait_share=0.25, config=config, artifact=small_artifact)
    page = Page((tmp_path / "out/model=shots/version=3/_report.html").read_text())
    assert [tag for tag, _ in page.tags].count("img") == 2
    assert "No picture: it is no longer there" in page.texts
    assert "No picture: it changed after it was scored" in page.texts
    assert "The predictor waited 25% of its time for images. Mean 2 images/s over 2 s." in page.texts
    pictures = report._thumbnails(full.top[2:], config)
    assert all(isinstance(picture, bytes) for picture in pictures.values())
    for (uri, picture), size in zip(pictures.items(), ((240, 180), (240, 60)), strict=True):
        (tmp_path / "thumbnail.jpg").write_bytes(bytes(picture))
        with Image.open(tmp_path / "thumbnail.jpg") as opened, Image.open(uri) as original:
            assert opened.format == "JPEG"
            assert opened.size == size
            near = original.convert("RGB").resize(size).tobytes()
            apart = [abs(a - b) for a, b in zip(opened.tobytes(), near, strict=True)]
            assert sum(apart) / len(apart) < 8
        assert len(picture) <= report.MOST_JPEG_BYTES


def test_noise_does_not_make_a_large_thumbnail(tmp_path):
    noise = Image.effect_noise((240, 240), 250).convert("RGB")
    noise.save(tmp_path / "noise.png")
    (row,) = next(iter(open_store(str(tmp_path)).list())).to_pylist()
    config = ScoreConfig(model="shots@3", input_uri=str(tmp_path), output_uri="out")
    (picture,) = report._thumbnails([TopRow(uri=row["uri"], etag=row["etag"], label="x", score=1)], config).values()
    assert isinstance(picture, bytes)
    assert len(picture) <= report.MOST_JPEG_BYTES


def test_a_report_that_cannot_be_written_is_a_warning_and_no_failure(tmp_path, small_artifact, caplog, monkeypatch):
    config, full, partition = run_of(tmp_path, 1)

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(partition.store), "put", refuse)
    with caplog.at_level(logging.WARNING):
        write_report(partition, full, timeline=[], wait_share=None, config=config, artifact=small_artifact)
    assert "disk full" in caplog.text
    assert not list((tmp_path / "out").rglob("*report.html"))


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def console_lines(page: Path, profile: Path) -> list[str]:
    """What the browser's console says of the page; it also draws it."""
    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    shot = page.with_suffix(".png")
    command = [str(CHROMIUM), "--headless", *quiet, f"--user-data-dir={profile}", f"--screenshot={shot}"]
    done = subprocess.run(
        [*command, "--enable-logging=stderr", "--window-size=1100,2400", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert shot.stat().st_size > 10_000
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_has_nothing_to_complain_of(tmp_path):
    rows = tuple(TopRow(uri=name, etag="", label="phishing", score=0.9) for name in HOSTILE)
    bad = tuple(BadRow(uri=name, code="empty", detail=name) for name in HOSTILE[:3])
    (tmp_path / "in").mkdir()
    Image.effect_noise((240, 135), 60).save(tmp_path / "in" / "thumb.jpg")
    pictures = dict.fromkeys(HOSTILE[:3], (tmp_path / "in" / "thumb.jpg").read_bytes())
    whole = data(night=night(top=rows, bad=bad), previous=night(), thumbnails=pictures, timeline=[(0, 0), (9, 900)])
    page = tmp_path / "report.html"
    page.write_text(build_report(whole))
    assert console_lines(page, tmp_path / "profile") == []
    # The same look at a page into which a script got shows that the look is not blind and that the policy holds.
    page.write_text(build_report(whole).replace("</main>", "<script>console.log('ran')</script></main>"))
    said = console_lines(page, tmp_path / "profile")
    assert any("Content Security Policy" in line for line in said)
    assert not any("ran" in line.split("CONSOLE")[1][:20] for line in said)
