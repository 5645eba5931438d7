"""Two nights of one model side by side: what changed, and whether that is worth a warning. Pure; words for people."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cnn_ray.tallies import SCORE_BINS, BadRow, TopRow, psi

PSI_NOTE, PSI_WARNING = 0.1, 0.25
CHANCE_Z = 4.0
"""Changes of a rate below this many standard errors are taken for chance: a report compares some ten rates a night."""
LABEL_NOTE, LABEL_WARNING = 0.02, 0.05
"""Changes of a label's share, absolute: with a million rows every change is significant, and few of them matter."""
RELATIVE_WARNING = 0.5
"""A rare label (phishing at 0.4 %) is told of when its share changes by half, long before that is 2 % of all."""
QUARANTINE_NOTE, QUARANTINE_WARNING = 0.005, 0.01
VOLUME_NOTE, VOLUME_WARNING = 0.25, 0.5

Level = Literal["same", "note", "warning"]


class Night(BaseModel):
    """What a report needs of a manifest. Other fields are ignored and missing ones empty: older manifests can be
    compared with newer ones."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    model: str
    version: int
    generation: int
    status: str
    planned: int
    scored: int
    quarantined: int
    flagged: int
    labels: dict[str, int] = {}
    codes: dict[str, int] = {}
    score_bins: tuple[int, ...] = (0,) * SCORE_BINS
    top: tuple[TopRow, ...] = ()
    bad: tuple[BadRow, ...] = ()
    removed: int = 0
    accepted: int = 0
    left_out: dict[str, int] = {}
    model_digest: str = ""
    engine: str = ""
    precision: str = ""
    runner: str = ""
    libraries: dict[str, str] = {}
    config: dict[str, Any] = {}
    started_at: str = ""
    finished_at: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One compared figure: its name, both values as text, the difference, and a sentence where it matters."""

    what: str
    before: str
    now: str
    difference: str
    level: Level
    sentence: str = ""


def compare(before: Night, now: Night) -> list[Change]:
    """All compared figures, in the order of the report: score shape, volume, quarantine, flagged, labels."""
    changes = [_score_shape(before, now), _volume(before, now)]
    changes.append(
        _rate(
            "quarantined",
            (before.quarantined, before.planned),
            (now.quarantined, now.planned),
            (QUARANTINE_NOTE, QUARANTINE_WARNING),
            only_up=True,
        )
    )
    limits = LABEL_NOTE, LABEL_WARNING
    changes.append(_rate("flagged", (before.flagged, before.scored), (now.flagged, now.scored), limits))
    common = Counter(before.labels) | Counter(now.labels)
    for label in sorted(common, key=lambda label: (-common[label], label)):
        counts = (before.labels.get(label, 0), before.scored), (now.labels.get(label, 0), now.scored)
        change = _rate(f"label {label}", *counts, limits)
        if len(common) == 2 and label != min(common, key=lambda name: (common[name], name)):
            change = replace(change, sentence="")  # the mirror of the rarer label's: told once
        changes.append(change)
    return changes


def chance_psi(rows_a: int, rows_b: int) -> float:
    """The PSI that two samples of one population hardly exceed (mean + 3 standard deviations of its chi-square)."""
    freedom = SCORE_BINS - 1
    return (1 / rows_a + 1 / rows_b) * (freedom + 3 * math.sqrt(2 * freedom))


def percent(share: float) -> str:
    """A share for people: 12.3 %, and more digits where it is small."""
    if share != share:
        return "–"
    return f"{share:.1%}" if share >= 0.1 or share == 0 else f"{share:.2%}" if share >= 0.001 else f"{share:.4%}"


def _score_shape(before: Night, now: Night) -> Change:
    value = psi(before.score_bins, now.score_bins)
    if math.isnan(value):
        return Change("PSI of scores", "–", "–", "not comparable", "same")
    chance = chance_psi(sum(before.score_bins), sum(now.score_bins))
    level: Level = "same"
    sentence = ""
    if value >= PSI_NOTE and value <= chance:
        level = "note"
        sentence = f"The PSI of the scores is {value:.2f}, but with so few rows chance alone gives up to {chance:.2f}."
    elif value >= PSI_WARNING:
        level = "warning"
        sentence = (
            f"The scores have another shape than before (PSI {value:.2f}, a shift from {PSI_WARNING:g} on): the "
            "screenshots come from another population, or the model or its input changed. Check before acting on them."
        )
    elif value >= PSI_NOTE:
        level = "note"
        sentence = f"The scores shifted somewhat (PSI {value:.2f}; a shift to act on begins at {PSI_WARNING:g})."
    return Change("PSI of scores", "–", "–", f"{value:.3f}", level, sentence)


def _volume(before: Night, now: Night) -> Change:
    if not before.planned:
        return Change("planned rows", "0", f"{now.planned:,}", "–", "same")
    change = now.planned / before.planned - 1
    # Half as many is as far from the same as twice as many.
    apart = max(now.planned, 1) / before.planned
    apart = max(apart, 1 / apart)
    level: Level = "warning" if apart >= 1 / (1 - VOLUME_WARNING) else "note" if apart >= 1 + VOLUME_NOTE else "same"
    sentence = ""
    if level != "same":
        sentence = f"{now.planned:,} screenshots were planned, {before.planned:,} before ({change:+.1%})."
    return Change("planned rows", f"{before.planned:,}", f"{now.planned:,}", f"{change:+.1%}", level, sentence)


def _rate(
    what: str, before: tuple[int, int], now: tuple[int, int], limits: tuple[float, float], *, only_up: bool = False
) -> Change:
    """One share compared; `before` and `now` are (count, rows), `limits` the changes that make a note and a warning."""
    if not before[1] or not now[1]:
        shares = [percent(count / rows) if rows else "–" for count, rows in (before, now)]
        return Change(what, shares[0], shares[1], "–", "same")
    old, new = before[0] / before[1], now[0] / now[1]
    pooled = (before[0] + now[0]) / (before[1] + now[1])
    error = math.sqrt(pooled * (1 - pooled) * (1 / before[1] + 1 / now[1]))
    apart = abs(new - old)
    level: Level = "same"
    if apart > CHANCE_Z * error:
        by_half = old * (1 - old) > 0 and apart >= RELATIVE_WARNING * min(old, 1 - old)
        level = "warning" if apart >= limits[1] or by_half else "note" if apart >= limits[0] else "same"
    if only_up and new < old and level == "warning":
        level = "note"
    sentence = ""
    if level != "same":
        verb = "rose" if new > old else "fell"
        of = f"of {what}" if what.startswith("label ") else what
        sentence = f"The share {of} {verb} from {percent(old)} to {percent(new)}, more than chance explains."
    return Change(what, percent(old), percent(new), f"{(new - old) * 100:+.2f} points", level, sentence)
