"""What the terminal shows of evaluations, calibrations and promotions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cnn_ray.console import print_table, say
from cnn_ray.evaluation_page import shown

if TYPE_CHECKING:
    from rich.console import Console

    from cnn_ray.artifact import Artifact
    from cnn_ray.calibration import Calibration
    from cnn_ray.evaluate import EvaluationResult
    from cnn_ray.promotion import Verdict


def print_evaluation(result: EvaluationResult, console: Console) -> None:
    """Prints the figures and where the page lies."""
    found = result.figures
    rows = [("images", f"{found.images:,}"), ("accuracy", shown(found.accuracy))]
    rows += [(f"top-{k}", f"{value:.3f}") for k, value in found.top_k.items() if k > 1]
    rows += [("log loss", f"{found.log_loss:.3f}"), ("calibration error", shown(found.calibration_error))]
    if found.binary is None:
        rows.append(("ROC-AUC, macro", shown(found.macro_roc_auc)))
    else:
        rows += [("ROC-AUC", shown(found.binary.roc_auc)), ("PR-AUC", shown(found.binary.pr_auc))]
        for recall in found.binary.recall_at_fpr:
            note = "" if recall.supported else f"; {found.binary.negatives} negatives are too few"
            rows.append((f"recall at FPR {recall.max_fpr:.1%}", shown(recall.recall) + note))
    rows += [(f"ROC-AUC within {part.name}", shown(part.roc_auc)) for part in result.sources if part.roc_auc.value]
    print_table(console, f"{result.reference} ({result.engine} {result.precision}) on {result.split}", rows)
    if result.earlier:
        named = ", ".join(dict.fromkeys(result.earlier))
        say(console, f"This test set was used before: {len(result.earlier)} x (by {named}).")
    if result.unreadable:
        codes = ", ".join(f"{code} {count}" for code, count in sorted(result.unreadable.items()))
        say(console, f"Unreadable images, left out: {codes}.")
    say(console, f"Page: {result.page_uri}")
    say(console, f"JSON: {result.json_uri}")


def print_calibration(fitted: Calibration, artifact: Artifact | None, console: Console) -> None:
    """Prints what was fitted, and the version that holds it."""
    rows = [
        ("temperature", f"{fitted.temperature:.3f}"),
        ("log loss", f"{fitted.log_loss_before:.4f} -> {fitted.log_loss_after:.4f}"),
        (f"threshold of {fitted.positive_label}", shown(fitted.threshold, 4)),
        ("false-positive rate", shown(fitted.fpr, 4)),
        ("recall", shown(fitted.recall)),
        ("engine", f"{fitted.engine} {fitted.precision}"),
    ]
    print_table(console, f"{fitted.from_reference} at a false-positive rate of {fitted.max_fpr:.2%}", rows)
    say(console, fitted.sentence)
    if artifact is None:
        say(console, "Nothing was written.")
    else:
        say(console, f"Model: {artifact.reference} in {artifact.uri}")


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Prints the comparison in one sentence."""
    say(console, verdict.sentence)
    if verdict.note:
        say(console, f"Note: {verdict.note}")
