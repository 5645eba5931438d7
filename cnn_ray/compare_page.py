"""A comparison of trainings as one HTML page: the table, learning curves, accuracy against cost. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cnn_ray.comparison_rows import ComparisonResult, Row, Spread
from cnn_ray.page import document, row, section, table, text
from cnn_ray.plots import Axis, Series, axis_of, chart

KERAS = "Keras Applications table"


@dataclass(frozen=True)
class Published:
    """What the authors, or Keras for its weights, say of ImageNet: accuracies on one centre crop."""

    year: int
    top_1: float | None
    top_5: float | None
    source: str


PUBLISHED = {
    "lenet5": Published(1998, None, None, "LeCun et al. 1998: digits only, 0.95 % error on MNIST"),
    "alexnet": Published(2012, 0.593, 0.818, "Krizhevsky et al. 2012, table 2, one CNN"),
    "VGG16": Published(2014, 0.713, 0.901, f"arXiv 1409.1556; {KERAS}"),
    "ResNet50": Published(2015, 0.749, 0.921, f"arXiv 1512.03385; {KERAS}"),
    "MobileNetV2": Published(2018, 0.713, 0.901, f"arXiv 1801.04381; {KERAS}"),
    "EfficientNetB0": Published(2019, 0.771, 0.933, f"arXiv 1905.11946; {KERAS}"),
}


def build_page(result: ComparisonResult) -> str:
    """The page as HTML."""
    title = f"Comparison {result.name}"
    facts = f"{result.images:,} images of {result.split}; mean over the seeds ± sample standard deviation"
    if result.split == "validation":
        facts += ". The data have no test part: EarlyStopping saw these images, so the figures flatter a little"
    return document(
        title,
        [
            f'<header><h1>{text(title)}</h1><span class="uri">{text(facts)}</span></header>',
            _failures(result),
            section("Measured here", _measured(result)),
            '<div class="columns">',
            section("Validation accuracy", _curves(result, "val_accuracy", "accuracy")),
            section("Validation loss", _curves(result, "val_loss", "loss")),
            section("Accuracy against parameters", _against(result, "parameters")),
            section("Accuracy against time", _against(result, "ms of CPU per image")),
            "</div>",
            section("Published for ImageNet", _published(result)),
        ],
    )


def spread_text(spread: Spread, digits: int = 3) -> str:
    """`0.712 ± 0.004`, without the deviation for one seed."""
    mean = f"{spread.mean:.{digits}f}"
    return mean if spread.deviation is None else f"{mean} ± {spread.deviation:.{digits}f}"


def table_cells(one: Row) -> tuple[str, ...]:
    """The cells of a variant: what the terminal and the page show alike."""
    return (
        one.variant,
        f"{one.parameters:,}",
        *(spread_text(one.top_k[k]) if k in one.top_k else "–" for k in ("1", "3", "5")),
        spread_text(one.log_loss),
        spread_text(one.train_s, 0),
        "–" if one.cpu_images_per_s is None else f"{one.cpu_images_per_s:,.0f}",
        "–" if one.gpu_images_per_s is None else f"{one.gpu_images_per_s:,.0f}",
        f"{one.size_bytes / 1e6:.1f}",
        f"{one.seeds}",
    )


HEAD = (
    "variant",
    "parameters",
    "top-1",
    "top-3",
    "top-5",
    "log loss",
    "training s",
    "CPU images/s",
    "GPU images/s",
    "MB",
    "seeds",
)


def _measured(result: ComparisonResult) -> str:
    head = (HEAD[0], *(f"#{name}" for name in HEAD[1:]))
    return f'<div class="wide">{table(head, [row(table_cells(one)) for one in result.rows])}</div>'


def _failures(result: ComparisonResult) -> str:
    items = "".join(f"<li>{text(f'{f.variant}, seed {f.seed}: {f.sentence}')}</li>" for f in result.failures)
    return f'<div class="alert warning"><b>Failed</b><ul>{items}</ul></div>' if items else ""


def _curves(result: ComparisonResult, name: str, label: str) -> str:
    series = [Series(one.variant, list(enumerate(one.curves[name], 1))) for one in result.rows]
    values = [value for one in result.rows for value in one.curves[name]]
    longest = max((len(one.curves[name]) for one in result.rows), default=1)
    return chart(name, series, Axis("epoch", 1, max(longest, 2), whole=True), axis_of(label, values))


def _against(result: ComparisonResult, cost: str) -> str:
    points: list[tuple[str, float, float]] = []
    for one in result.rows:
        if cost == "parameters":
            points.append((one.variant, float(one.parameters), one.top_k["1"].mean))
        elif one.cpu_images_per_s:
            points.append((one.variant, 1000 / one.cpu_images_per_s, one.top_k["1"].mean))
    if not points:
        return '<p class="soft">Not measured.</p>'
    series = [Series(name, [(x, y)], "dots", [name]) for name, x, y in points]
    x = axis_of(cost, [x for _, x, _ in points], log=True)
    return chart(f"accuracy against {cost}", series, x, axis_of("top-1", [y for _, _, y in points]))


def _published(result: ComparisonResult) -> str:
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    rows = [
        row(
            (
                one.variant,
                one.architecture,
                known.source,
                str(known.year),
                cell(known.top_1),
                cell(known.top_5),
                cell(one.top_k["1"].mean),
                cell(one.top_k["5"].mean if "5" in one.top_k else None),
            ),
            numbers_from=3,
        )
        for one in result.rows
        if (known := PUBLISHED.get(one.architecture)) is not None
    ]
    if not rows:
        return '<p class="soft">Nothing is published for these.</p>'
    head = ("variant", "architecture", "source", "#year", "#top-1", "#top-5", "#top-1 here", "#top-5 here")
    return f'<div class="wide">{table(head, rows)}</div>'
