"""An evaluation as one HTML page, in the manner of the run report. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cnn_ray.judged import EvaluationResult, LabelledScores, Part
from cnn_ray.metrics import BinaryFigures, Estimate, Figures, Ranked
from cnn_ray.page import document, figures, picture, row, section, table, text
from cnn_ray.plots import Axis, Series, chart, heat_table

MOST_CLASSES = 30
"""A larger confusion matrix is left to the JSON."""
MOST_POINTS = 400
UNIT = (0.0, 1.0)


def build_page(result: EvaluationResult, scored: LabelledScores, thumbnails: Mapping[str, bytes]) -> str:
    """The page as HTML; thumbnails: uri -> JPEG."""
    found = result.figures
    title = f"{result.reference} on {result.split}"
    return document(
        title,
        [
            f'<header><h1>{text(title)}</h1><span class="uri">{text(result.data_uri)}</span></header>',
            _notes(result),
            figures(_top(found)),
            _binary(found.binary),
            '<div class="columns">',
            _curves(scored, found.binary),
            section("Reliability", _reliability(found)),
            "</div>",
            section("By class", _classes(found)),
            _confusion(found),
            _breakdown("By source", result.sources),
            _breakdown("By group, largest first", result.groups),
            _gallery(result, thumbnails),
            _facts(result),
        ],
    )


def shown(estimate: Estimate, digits: int = 3) -> str:
    """`0.912 (0.880 to 0.940)`, or a dash for what cannot be computed."""
    if estimate.value is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def _split(name: str, estimate: Estimate, digits: int = 3) -> tuple[str, str, str]:
    value = "–" if estimate.value is None else f"{estimate.value:.{digits}f}"
    interval = "" if estimate.low is None else f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"
    return name, value, interval


def _top(found: Figures) -> list[tuple[str, str, str]]:
    pairs = [("images", f"{found.images:,}", ""), _split("accuracy", found.accuracy)]
    pairs += [(f"top-{k}", f"{value:.3f}", "") for k, value in found.top_k.items() if k > 1]
    pairs.append(_split("ROC-AUC" if found.binary else "ROC-AUC, macro", _auc(found)))
    if found.binary:
        pairs.append(_split("PR-AUC", found.binary.pr_auc))
    return [*pairs, ("log loss", f"{found.log_loss:.3f}", "nats"), _split("calibration error", found.calibration_error)]


def _auc(found: Figures) -> Estimate:
    return found.binary.roc_auc if found.binary else found.macro_roc_auc


def _notes(result: EvaluationResult) -> str:
    notes: list[str] = []
    if result.earlier:
        named = ", ".join(dict.fromkeys(result.earlier))
        notes.append(
            f"This test set was used before, {len(result.earlier)} x (by {named}): the more often versions are "
            "chosen on it, the less it says about new images."
        )
    if result.unreadable:
        codes = ", ".join(f"{code} {count}" for code, count in sorted(result.unreadable.items()))
        notes.append(f"{sum(result.unreadable.values())} images could not be read and are left out: {codes}.")
    if result.figures.binary and result.figures.binary.positives * result.figures.binary.negatives == 0:
        notes.append("The images are all of one kind, positive or negative: areas and recall cannot be computed.")
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return f'<div class="alert note"><b>Note</b><ul>{items}</ul></div>' if notes else ""


def _binary(found: BinaryFigures | None) -> str:
    if found is None:
        return ""
    rows = [
        row(
            (
                f"{recall.max_fpr:.1%}",
                shown(recall.recall),
                "yes" if recall.supported else _unsupported(recall.max_fpr),
            )
        )
        for recall in found.recall_at_fpr
    ]
    at = (
        f"At the model's threshold {found.threshold:.4g}: recall {shown(found.recall_at_threshold)}, "
        f"false-positive rate {shown(found.fpr_at_threshold, 4)}, precision "
        f"{'–' if found.precision_at_threshold is None else f'{found.precision_at_threshold:.3f}'}."
    )
    head = ("false-positive rate", "#recall", "#enough negatives")
    counts = f"{found.positives:,} positives, {found.negatives:,} negatives. {at}"
    title = f"Recall of {text(found.positive_label, 60)} at a false-positive rate"
    return section(title, f'<p class="soft">{text(counts)}</p>' + table(head, rows))


def _unsupported(max_fpr: float) -> str:
    return f"no: needs {1 / max_fpr:,.0f}"


def _curves(scored: LabelledScores, found: BinaryFigures | None) -> str:
    if found is None or scored.positive is None or found.positives * found.negatives == 0:
        return ""
    ranked = Ranked(scored.scores[:, scored.positive], scored.truth == scored.positive)
    true, false = ranked.curve()
    steps = np.unique(np.linspace(0, len(true) - 1, min(MOST_POINTS, len(true))).astype(int))
    recall, fpr = true[steps] / true[-1], false[steps] / false[-1]
    precision = true[steps] / np.maximum(true[steps] + false[steps], 1)
    roc = Series("ROC", [(0.0, 0.0), *zip(fpr.tolist(), recall.tolist(), strict=True)])
    pr = Series("precision over recall", list(zip(recall.tolist(), precision.tolist(), strict=True)))
    unit_x, unit_y = Axis("false-positive rate", *UNIT), Axis("recall", *UNIT)
    return section("ROC", chart("ROC", [roc], unit_x, unit_y, diagonal=True)) + section(
        "Precision and recall", chart("PR", [pr], Axis("recall", *UNIT), Axis("precision", *UNIT))
    )


def _reliability(found: Figures) -> str:
    points = [(one.confidence, one.accuracy) for one in found.bins]
    series = [Series("right answers", points), Series("", points, "dots")]
    drawn = chart("Reliability", series, Axis("confidence", *UNIT), Axis("accuracy", *UNIT), diagonal=True)
    return drawn + f'<p class="soft">Calibration error {shown(found.calibration_error)}.</p>'


def _classes(found: Figures) -> str:
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    rows = [
        row((c.label, f"{c.support:,}", cell(c.precision), cell(c.recall), cell(c.f1), cell(c.average_precision)))
        for c in found.classes
    ]
    return table(("label", "#images", "#precision", "#recall", "#F1", "#PR-AUC"), rows)


def _confusion(found: Figures) -> str:
    if len(found.classes) > MOST_CLASSES:
        return ""
    return section("Confusion", heat_table([c.label for c in found.classes], found.confusion))


def _breakdown(title: str, parts: tuple[Part, ...]) -> str:
    if not parts:
        return ""
    rows = [
        row(
            (
                p.name,
                f"{p.images:,}",
                "–" if p.positives is None else f"{p.positives:,}",
                f"{p.accuracy:.3f}",
                shown(p.roc_auc),
            )
        )
        for p in parts
    ]
    return section(title, table(("name", "#images", "#positives", "#accuracy", "#ROC-AUC within"), rows))


def _gallery(result: EvaluationResult, thumbnails: Mapping[str, bytes]) -> str:
    if not result.mistakes:
        return section("Most confident mistakes", '<p class="soft">None.</p>')
    items: list[str] = []
    for mistake in result.mistakes:
        jpeg = thumbnails.get(mistake.uri)
        frame = picture(jpeg, mistake.uri) if jpeg else "<span>No picture</span>"
        items.append(
            f'<li><div class="frame">{frame}</div><b>{mistake.score:.3f}</b> {text(mistake.answered, 60)}, is '
            f'{text(mistake.truth, 60)}<span class="uri">{text(mistake.uri)}</span></li>'
        )
    return section("Most confident mistakes", '<ul class="gallery">' + "\n".join(items) + "</ul>")


def _facts(result: EvaluationResult) -> str:
    pairs = [
        ("engine", f"{result.engine} {result.precision}"),
        ("data digest", result.data_digest),
        (
            "intervals",
            "bootstrap by percentiles over groups (images where there are none); Clopper-Pearson at thresholds",
        ),
    ]
    return section("Facts", table((), [row(pair, numbers_from=9) for pair in pairs], "facts"))
