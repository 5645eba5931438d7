"""Every night by itself: each date of the look-back window that owes a manifest is scored, missed nights among them.

One call resolves the alias once, works the owed dates off in order, waits (bounded) for those whose screenshots are not
complete yet, and ends so that any scheduler knows what to do: 0 nothing is owed, 75 come again, 4 a date is over the
quarantine limit and needs a person, 1-3 as everywhere. Calling it too often, on several hosts, or while another call
works does no harm: the lease of each partition lets one run work on a date.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from datetime import date as Date
from typing import NoReturn

from cnn_ray.artifact import load_artifact
from cnn_ray.comparison import Night, compare
from cnn_ray.config import NightlyConfig, ScoreConfig
from cnn_ray.errors import (
    BusyError,
    CnnRayError,
    NoImagesError,
    PlanError,
    QuarantineLimitError,
    RunInterruptedError,
    UnavailableError,
)
from cnn_ray.nightly_status import (
    NO_IMAGE,
    NO_SCREENSHOTS,
    CallRecord,
    DateRecord,
    DateState,
    ModelRecord,
    State,
    read_status,
    record,
    state_of,
    told_of,
)
from cnn_ray.partitions import look_back
from cnn_ray.readiness import empty_is_done, is_empty, is_settled_empty, why_not_ready
from cnn_ray.redaction import redact
from cnn_ray.report import previous_night
from cnn_ray.score import Progress, ScoreResult, run_score
from cnn_ray.storage_options import use_storage_options
from cnn_ray.webhook import post_json

POLL_S = 30.0
"""How often dates that are not ready are looked at again."""
BUG = 1
TRY_AGAIN = 75
QUARANTINE_LIMIT = QuarantineLimitError.exit_code

log = logging.getLogger(__name__)


class Clock:
    """The time, always UTC: what a machine's zone says, and when it changes, decides nothing here."""

    def now(self) -> datetime:
        """Now."""
        return datetime.now(UTC)

    def sleep(self, seconds: float) -> None:
        """Returns `seconds` later."""
        time.sleep(seconds)


@dataclass(frozen=True)
class DateResult:
    """How one date ended in this call, or that it was done, failed or running already. `exit_code` is what a call would
    end with that had this date alone."""

    date: Date
    state: State
    detail: str
    exit_code: int
    version: int | None = None
    drift: tuple[str, ...] = ()


@dataclass(frozen=True)
class NightlyResult:
    """What a call came to; `dates` has every date of the window, oldest first."""

    reference: str
    dates: tuple[DateResult, ...]

    @property
    def exit_code(self) -> int:
        """An error of configuration comes first, because waiting does not mend it; then 75, because it brings the next
        call; then 4."""
        codes = {result.exit_code for result in self.dates}
        others = codes - {0, QUARANTINE_LIMIT, TRY_AGAIN}
        if others:
            return min(others)
        return TRY_AGAIN if TRY_AGAIN in codes else max(codes, default=0)


class _BudgetError(KeyboardInterrupt):
    """A date's time is over. Of the kind that SIGTERM raises: whatever survives that survives this."""


def run_nightly(
    config: NightlyConfig,
    today: Date | None = None,
    *,
    clock: Clock | None = None,
    on_progress: Callable[[Date, Progress], None] | None = None,
) -> NightlyResult:
    """What the call came to, each date with its own end; no date's failure keeps the others from their turn.

    Raises:
        ArtifactError, ConfigError: there is no such model.
        StorageError: storage does not tell what the dates owe.
    """
    use_storage_options(config.score)
    clock = clock or Clock()
    started = clock.now()
    night = _Night(config, clock, on_progress)
    window = look_back(today or started.date(), config.look_back_days, config.lag_days, config.first_date)
    call = CallRecord(reference=night.reference, host=socket.gethostname(), started_at=_stamp(started))
    night.remember(lambda known: known.model_copy(update={"last_call": call}))
    exit_code: int | None = None  # what a bug leaves
    try:
        night.work_off(window)
        result = NightlyResult(night.reference, tuple(night.results[date] for date in window))
        exit_code = result.exit_code
    except CnnRayError as error:
        exit_code = error.exit_code
        raise
    except KeyboardInterrupt:
        exit_code = RunInterruptedError.exit_code
        raise
    finally:
        ended = call.model_copy(update={"finished_at": _stamp(clock.now()), "exit_code": exit_code})
        night.remember(lambda known: known.model_copy(update={"last_call": ended}))
    return result


class _Night:
    """One call: its version, and what its dates have come to."""

    def __init__(
        self, config: NightlyConfig, clock: Clock, on_progress: Callable[[Date, Progress], None] | None
    ) -> None:
        artifact = load_artifact(config.score.models_uri, config.score.model)
        self.config = config
        self.clock = clock
        self.model, self.version, self.reference = artifact.name, artifact.version, artifact.reference
        self.results: dict[Date, DateResult] = {}
        self._on_progress = on_progress
        self._tried = 0
        self._stopped = ""
        self._recorded: dict[str, DateRecord] | None = None

    def state(self, date: Date) -> DateState:
        """What the date owes now."""
        config = self.config
        any_version = not config.rescore_new_version
        return state_of(config.score.output_uri, date, self.model, self.version, any_version=any_version)

    def work_off(self, window: Sequence[Date]) -> None:
        """Afterwards each date of the window has its result."""
        remaining = list(window) if self.config.order == "oldest" else list(reversed(window))
        end = self.clock.now() + timedelta(seconds=self.config.wait_timeout_s)
        while True:
            remaining = [date for date in remaining if not self._attend(date)]
            left_s = (end - self.clock.now()).total_seconds()
            if not remaining or left_s <= 0:
                break
            self.clock.sleep(min(POLL_S, left_s))
        for date in remaining:
            if self.results[date].state == "owed" and empty_is_done(self.config, date, self.clock.now().date()):
                self._keep(DateResult(date, "done", NO_IMAGE, 0))
        for date in remaining:  # who worked on it may be through by now
            if self.results[date].state == "running" and (state := self._unsettled(date)) is not None:
                self._keep_owed(date, state.detail)

    def _attend(self, date: Date) -> bool:
        """Whether the date has its result for this call; False where it may become ready while the call waits."""
        state = self._unsettled(date)
        if state is None:
            return self.results[date].state != "running"
        if self._stopped or self._tried >= self.config.max_dates:
            self._keep_owed(date, self._stopped or f"left to the next call (max_dates {self.config.max_dates})")
            return True
        reason = None if state.is_open else why_not_ready(self.config, date, self.clock.now())
        if reason is not None:
            self._keep_owed(date, reason)
            return False
        self._tried += 1
        result = self._try(date)
        self._keep(result)
        return result.state != "running"

    def tell(self, event: str, result: DateResult) -> None:
        """Afterwards the webhook has been called, where there is one. That it failed is a warning."""
        url = self.config.webhook_url
        if url is None:
            return
        message = {
            "event": event,
            "model": self.reference,
            "date": result.date.isoformat(),
            "state": result.state,
            "exit_code": result.exit_code,
            "detail": result.detail,
            "drift": list(result.drift),
            "output_uri": self.config.score.output_uri,
            "text": f"cnn-ray nightly, {result.date}, {event}: {' '.join(result.drift) or result.detail}",
        }
        failure = post_json(url, message)
        if failure is not None:
            log.warning("The webhook was not told of %s: %s.", result.date, failure)

    def remember(self, change: Callable[[ModelRecord], ModelRecord]) -> None:
        """Afterwards the status object has the change; where it cannot be written, a warning says so."""
        try:
            record(self.config.score.output_uri, self.model, change)
        except CnnRayError as error:  # it is for people; the partitions are the truth
            log.warning("The status of the night is not written: %s", error)

    def _unsettled(self, date: Date) -> DateState | None:
        """What the date owes; None where it owes nothing that this call could do, and has its result."""
        try:
            state = self.state(date)
        except PlanError as error:
            self._keep(DateResult(date, "failed", str(error), error.exit_code, self.version))
            return None
        if state.state == "owed" and not state.is_open and is_settled_empty(self.config, self._known(date)):
            self.results[date] = DateResult(date, "done", NO_IMAGE, 0)
            return None
        if state.state == "owed":
            return state
        code = {"done": 0, "failed": QUARANTINE_LIMIT, "running": TRY_AGAIN}[state.state]
        self.results[date] = DateResult(date, state.state, state.detail, code, state.version)
        return None

    def _known(self, date: Date) -> DateRecord | None:
        """What earlier calls have recorded of the date; nothing where the status object cannot be read."""
        if self._recorded is None:
            try:
                known = read_status(self.config.score.output_uri).models.get(self.model, ModelRecord())
            except CnnRayError as error:
                log.warning("The status of earlier nights is not read: %s", error)
                known = ModelRecord()
            self._recorded = known.dates
        return self._recorded.get(date.isoformat())

    def _try(self, date: Date) -> DateResult:
        """How the date ended: scored as far as its time allows, or why not."""
        if self.config.wait_for_marker is not None and is_empty(self.config, date):
            return DateResult(date, "done", NO_SCREENSHOTS, 0)
        score = self.config.score.model_dump()
        settings = ScoreConfig.model_validate({**score, "date": date, "model": self.reference})
        told = self._on_progress
        try:
            with _budget(self.config.date_budget_s):
                result = run_score(settings, None if told is None else lambda progress: told(date, progress))
        except _BudgetError:
            reason = f"stopped after its {self.config.date_budget_s:g} s; what is committed is kept"
            return DateResult(date, "owed", reason, TRY_AGAIN, self.version)
        except QuarantineLimitError as error:
            return DateResult(date, "failed", str(error), QUARANTINE_LIMIT, self.version)
        except NoImagesError as error:  # a manifest without rows, say
            if self.config.empty_date == "done" and date < self.clock.now().date():
                return DateResult(date, "done", NO_IMAGE, 0)
            return DateResult(date, "failed", str(error), error.exit_code, self.version)
        except CnnRayError as error:
            if isinstance(error, UnavailableError):  # the other dates would wait for the same storage or cluster
                self._stopped = "left to the next call: storage or workers were away"
            state: State = "running" if isinstance(error, BusyError) else "owed" if error.retryable else "failed"
            return DateResult(date, state, str(error), TRY_AGAIN if error.retryable else error.exit_code, self.version)
        except Exception as error:  # one date's bug must not cost the nights after it
            if os.environ.get("CNN_RAY_DEBUG"):
                raise
            reason = " ".join(str(error).split())[:300]
            return DateResult(date, "failed", f"a bug: {type(error).__name__}: {reason}", BUG, self.version)
        drift = () if result.already_done else _drift(settings, result)
        return DateResult(date, "done", told_of(result.manifest), 0, self.version, drift)

    def _keep_owed(self, date: Date, reason: str) -> None:
        self._keep(DateResult(date, "owed", reason, TRY_AGAIN))

    def _keep(self, result: DateResult) -> None:
        result = replace(result, detail=redact(result.detail))  # it is stored, shown and sent
        if result == self.results.get(result.date):
            return
        self.results[result.date] = result
        kept = DateRecord(
            state=result.state,
            detail=result.detail,
            exit_code=result.exit_code,
            version=result.version,
            drift=result.drift,
            at=_stamp(self.clock.now()),
        )
        day = result.date.isoformat()
        self.remember(lambda known: known.model_copy(update={"dates": {**known.dates, day: kept}}))
        if result.state == "failed":
            self.tell("failed", result)
        elif result.drift:
            self.tell("drift", result)


@contextmanager
def _budget(seconds: float | None) -> Iterator[None]:
    """Inside, this thread is interrupted after the time; only the main thread can be, elsewhere there is no limit.

    Raises:
        _BudgetError: the time was over before the block was.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(_number: int, _frame: object) -> NoReturn:
        raise _BudgetError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _drift(settings: ScoreConfig, result: ScoreResult) -> tuple[str, ...]:
    """The warnings of the run's report: what changed since the night before by more than chance, one sentence each."""
    manifest = result.manifest
    try:
        earlier = previous_night(settings.output_uri, settings.date, manifest.model, manifest.version)
    except CnnRayError as error:
        log.warning("%s is compared with no earlier night: %s", settings.date, error)
        return ()
    if earlier is None:
        return ()
    before, now = (Night.model_validate(m.model_dump(mode="json")) for m in (earlier.manifest, manifest))
    return tuple(change.sentence for change in compare(before, now) if change.level == "warning" and change.sentence)


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
