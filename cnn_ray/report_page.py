"""The page that a person opens: one HTML text without scripts, links or anything to load. Pure.

File names, labels and details come from whoever made the screenshots: each passes `page.text`, and the page's own
policy (Content-Security-Policy) forbids scripts and the network, should one ever slip through.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cnn_ray import charts
from cnn_ray.comparison import Change, Night, compare, percent
from cnn_ray.input_filters import describe_left_out
from cnn_ray.page import document
from cnn_ray.page import section as _section
from cnn_ray.page import table as _table
from cnn_ray.page import text as _text

MOST_LABELS = 20
MOST_ALERTS = 8


@dataclass(frozen=True, slots=True)
class ReportData:
    """All that a report shows.

    thumbnails: uri -> JPEG bytes, or why there are none; timeline: (seconds since this attempt began, rows committed by
    then), those of earlier attempts among them; wait_share: share of its time that the predictor waited for images.
    """

    night: Night
    partition_uri: str
    date: str | None = None
    positive_label: str | None = None
    threshold: float = 0.5
    previous: Night | None = None
    previous_date: str | None = None
    thumbnails: Mapping[str, bytes | str] = field(default_factory=dict[str, "bytes | str"])
    timeline: Sequence[tuple[float, int]] = ()
    wait_share: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])


def build_report(data: ReportData) -> str:
    """The whole page as HTML; the same data give the same text."""
    changes = [] if data.previous is None else compare(data.previous, data.night)
    title = f"{data.night.model}@{data.night.version}" + (f" · {data.date}" if data.date else "")
    parts = [
        _header(data, title),
        _alerts(data, changes),
        _figures(data),
        '<div class="columns">',
        _labels(data.night),
        _histogram(data),
        "</div>",
        _gallery(data),
        _quarantine(data.night),
        '<div class="columns">',
        _comparison(data, changes),
        _throughput(data),
        "</div>",
        _facts(data),
    ]
    return document(title, parts)


def _header(data: ReportData, title: str) -> str:
    good = data.night.status == "complete"
    badge = f'<span class="badge {"good" if good else "bad"}">{_text(data.night.status)}</span>'
    return f'<header><h1>{_text(title)}</h1>{badge}<span class="uri">{_text(data.partition_uri)}</span></header>'


def _alerts(data: ReportData, changes: list[Change]) -> str:
    night = data.night
    told: list[tuple[str, str]] = []
    if night.status == "quarantine_limit":
        limit = data.config.get("max_quarantine_rate")
        allowed = f" Allowed are {percent(limit)}." if isinstance(limit, float) else ""
        told.append(
            (
                "warning",
                f"{night.quarantined:,} of {night.planned:,} screenshots ({percent(_share(night))}) could not be read."
                f"{allowed} Readers refuse this run until somebody accepts it (--accept) or the files are mended.",
            )
        )
    elif night.accepted:
        told.append(("note", f"Somebody accepted {night.accepted:,} unreadable screenshots of this run as they are."))
    told += [(change.level, change.sentence) for change in changes if change.sentence]
    if data.previous is not None and data.previous.version != night.version:
        told.append(
            ("note", f"The earlier night ({data.previous_date}) was scored by version {data.previous.version}.")
        )
    boxes: list[str] = []
    for level, name in (("warning", "Warning"), ("note", "Note")):
        sentences = [f"<li>{_text(sentence)}</li>" for of, sentence in told if of == level]
        if len(sentences) > MOST_ALERTS:
            sentences[MOST_ALERTS:] = [f"<li>And {len(sentences) - MOST_ALERTS} more, see the comparison.</li>"]
        if sentences:
            boxes.append(f'<div class="alert {level}"><b>{name}</b><ul>{"".join(sentences)}</ul></div>')
    return "\n".join(boxes)


def _share(night: Night) -> float:
    return night.quarantined / night.planned if night.planned else 0.0


def _figures(data: ReportData) -> str:
    night = data.night
    flagged = f"{percent(night.flagged / night.scored)} of scored" if night.scored else "nothing scored"
    figures = [
        ("planned", night.planned, ""),
        ("scored", night.scored, ""),
        ("flagged", night.flagged, flagged),
        ("quarantined", night.quarantined, f"{percent(_share(night))} of planned"),
        ("generation", night.generation, ""),
    ]
    if night.removed:
        figures.append(("removed", night.removed, "no longer in the input"))
    if night.left_out:
        figures.append(("left out", sum(night.left_out.values()), "in the input, but no images to score"))
    cells = (
        f"<div><dt>{name}</dt><dd>{count:,}{f'<small>{note}</small>' if note else ''}</dd></div>"
        for name, count, note in figures
    )
    return '<dl class="figures">' + "".join(cells) + "</dl>"


def _labels(night: Night) -> str:
    if not night.labels:
        return _section("Labels", '<p class="soft">Nothing was scored.</p>')
    ordered = sorted(night.labels.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ordered[:MOST_LABELS]
    if rest := ordered[MOST_LABELS:]:
        shown = [*shown, (f"{len(rest)} other labels", sum(count for _, count in rest))]
    most = max(count for _, count in shown) or 1
    rows = (
        f'<tr><th scope="row">{_text(label, 100)}</th>'
        f'<td><span class="bar" style="width:{100 * count / most:.1f}%"></span></td>'
        f'<td class="number">{count:,}</td><td class="number">{percent(count / max(night.scored, 1))}</td></tr>'
        for label, count in shown
    )
    return _section("Labels", _table(("label", "", "#rows", "#share"), rows, "bars"))


def _histogram(data: ReportData) -> str:
    label = data.positive_label
    title = "Best score" if label is None else f"Score of “{_text(label, 60)}”"
    bins, before = data.night.score_bins, data.previous.score_bins if data.previous else ()
    if not sum(bins):
        return _section(title, '<p class="soft">No scores to show.</p>')
    legend = '<span><i class="key"></i>this run</span>'
    if sum(before):
        legend += f'<span><i class="key before"></i>{_text(data.previous_date or "before")}</span>'
    if label is not None:
        legend += f'<span><i class="key limit"></i>threshold {data.threshold:g}</span>'
    chart = charts.histogram(bins, before, None if label is None else data.threshold)
    return _section(title, f'{chart}\n<p class="soft legend">{legend}<span>rows, logarithmic</span></p>')


def _gallery(data: ReportData) -> str:
    title = "Flagged, highest scores first"
    if data.positive_label is None:
        return _section(title, '<p class="soft">The model has no positive label, so nothing is flagged.</p>')
    if not data.night.top:
        return _section(title, '<p class="soft">No screenshot reached the threshold.</p>')
    items: list[str] = []
    for row in data.night.top:
        picture = data.thumbnails.get(row.uri, "no thumbnail")
        if isinstance(picture, bytes):
            encoded = base64.b64encode(picture).decode()
            frame = f'<img src="data:image/jpeg;base64,{encoded}" alt="Screenshot {_text(row.uri)}">'
        else:
            frame = f"<span>No picture: {_text(picture, 200)}</span>"
        items.append(
            f'<li><div class="frame">{frame}</div><b>{row.score:.3f}</b> {_text(row.label, 100)}'
            f'<span class="uri">{_text(row.uri)}</span></li>'
        )
    shown = f'<p class="soft">{len(items)} of {data.night.flagged:,} flagged screenshots.</p>'
    return _section(title, f'{shown}\n<ul class="gallery">\n' + "\n".join(items) + "\n</ul>")


def _quarantine(night: Night) -> str:
    if not night.quarantined:
        return _section("Quarantine", '<p class="soft">Every planned screenshot was scored.</p>')
    rows: list[str] = []
    for code, count in sorted(night.codes.items(), key=lambda pair: (-pair[1], pair[0])):
        examples = "".join(
            f'<li><span class="uri">{_text(bad.uri)}</span><br><span class="soft">{_text(bad.detail, 400)}</span></li>'
            for bad in night.bad
            if bad.code == code
        )
        rows.append(
            f'<tr><th scope="row">{_text(code, 60)}</th><td class="number">{count:,}</td>'
            f'<td><ul class="bad">{examples}</ul></td></tr>'
        )
    return _section("Quarantine", _table(("code", "#rows", "examples"), rows, "codes"))


def _comparison(data: ReportData, changes: list[Change]) -> str:
    title = f"Compared with {_text(data.previous_date or 'an earlier night')}"
    if data.previous is None:
        title = "Comparison"
        why = "No earlier night of this model was found." if data.date else "This run has no date to go back from."
        return _section(title, f'<p class="soft">{why}</p>')
    shown = changes[: 4 + MOST_LABELS]
    rows = (
        f'<tr class="{change.level}"><th scope="row">{_text(change.what, 120)}</th>'
        f'<td class="number">{change.before}</td><td class="number">{change.now}</td>'
        f'<td class="number">{change.difference}</td></tr>'
        for change in shown
    )
    return _section(title, _table(("", "#before", "#this run", "#change"), rows))


def _throughput(data: ReportData) -> str:
    waited = "" if data.wait_share is None else f"The predictor waited {data.wait_share:.0%} of its time for images. "
    chart = charts.throughput(data.timeline)
    if chart is None:
        return _section("Throughput", f'<p class="soft">{waited}Too few commits for a curve.</p>')
    (start_s, first), (end_s, last) = data.timeline[0], data.timeline[-1]
    spent_s = end_s - start_s
    mean = (last - first) / spent_s
    said = f"{waited}Mean {mean:,.0f}" if mean >= 1000 else f"{waited}Mean {mean:.4g}"
    said += f" images/s over {charts.duration(spent_s)}."
    if first:
        said += f" {first:,} rows came from earlier attempts."
    return _section("Throughput, images/s", f'{chart}\n<p class="soft">{said}</p>')


def _facts(data: ReportData) -> str:
    night = data.night
    facts: list[tuple[str, object]] = [
        ("model", f"{night.model}@{night.version}"),
        ("model digest", night.model_digest),
        ("engine", f"{night.engine} {night.precision}"),
        ("runner", night.runner),
        ("started", night.started_at),
        ("finished", night.finished_at),
        ("libraries", ", ".join(f"{name} {version}" for name, version in night.libraries.items())),
    ]
    if night.left_out:
        facts.append(("left out of the input", describe_left_out(night.left_out)))
    facts += [(f"config {key}", value) for key, value in data.config.items() if value is not None]
    rows = (f'<tr><th scope="row">{_text(name, 60)}</th><td>{_text(value, 600)}</td></tr>' for name, value in facts)
    return _section("Run", _table((), rows, "facts"))
