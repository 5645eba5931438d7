"""The dates of the look-back window as they stand, for people; nothing is written."""

from __future__ import annotations

from dataclasses import replace
from datetime import date as Date
from datetime import datetime

from cnn_ray.artifact import load_artifact
from cnn_ray.config import NightlyConfig
from cnn_ray.errors import PlanError, QuarantineLimitError
from cnn_ray.nightly_status import NO_IMAGE, NO_SCREENSHOTS, DateRecord, DateState, ModelRecord, read_status, state_of
from cnn_ray.partitions import look_back
from cnn_ray.readiness import empty_is_done, is_settled_empty, why_not_ready


def calendar(config: NightlyConfig, today: Date) -> list[DateState]:
    """What each date of the window owes now, oldest first, and why, where the last attempt left word.

    Raises:
        ArtifactError, ConfigError: there is no such model.
        StorageError: storage refused.
    """
    score = config.score
    artifact = load_artifact(score.models_uri, score.model)
    known = read_status(score.output_uri).models.get(artifact.name, ModelRecord()).dates
    states: list[DateState] = []
    for date in look_back(today, config.look_back_days, config.lag_days, config.first_date):
        try:
            any_version = not config.rescore_new_version
            state = state_of(score.output_uri, date, artifact.name, artifact.version, any_version=any_version)
        except PlanError as error:  # one damaged manifest must not hide the other dates
            state = DateState(date, "failed", str(error), artifact.version)
        states.append(_with_word(config, state, known.get(date.isoformat())))
    return states


def foresee(config: NightlyConfig, today: Date, now: datetime) -> list[DateState]:
    """The same, where `detail` says what a call would do about the date.

    Raises:
        ArtifactError, ConfigError: there is no such model.
        StorageError: storage refused.
    """
    return [_foreseen(config, state, now) for state in calendar(config, today)]


def _foreseen(config: NightlyConfig, state: DateState, now: datetime) -> DateState:
    if state.state == "running" or state.manifest is not None or state.state == "done":
        return state
    if state.is_open:
        return replace(state, detail="would be finished")
    if empty_is_done(config, state.date, now.date()):
        return replace(state, detail=f"would be done: {NO_IMAGE}")
    return replace(state, detail=why_not_ready(config, state.date, now) or "would be scored")


def _with_word(config: NightlyConfig, state: DateState, known: DateRecord | None) -> DateState:
    """The state; where it owes a run, with the word that the last attempt left."""
    if state.state != "owed" or known is None:
        return state
    if known.detail == NO_SCREENSHOTS or is_settled_empty(config, known):
        return replace(state, state="done", detail=known.detail)
    if known.state in ("done", "running") or known.exit_code == QuarantineLimitError.exit_code:
        return state  # the partition would tell: somebody has removed it, or given up, since
    return replace(state, state=known.state, detail=known.detail)
