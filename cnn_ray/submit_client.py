"""Ray's job server as this package talks to it: its errors in our words, and a job watched to its own exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cnn_ray.auth import is_loopback
from cnn_ray.errors import AccessDeniedError, CnnRayError, ConfigError, NotFoundError, UnavailableError
from cnn_ray.submit import Resources, Submission, runtime_env, working_folder

POLL_S = 2.0
LOST_S = 120.0
"""A job server that does not answer for longer than this is given up; the job goes on without us."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOPPED_CODE = 130
NEVER_STARTED_CODE = 75
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def travels_in_clear(address: str, token_mode: bool) -> bool:
    """Whether a token would go to another machine over plain http, where whoever is in between can read it."""
    url = urlsplit(address)
    return token_mode and url.scheme == "http" and not (url.hostname == "localhost" or is_loopback(url.hostname or ""))


@dataclass(frozen=True)
class JobState:
    """What the job server says of a job: state, its command, times in ms since 1970, exit code of its process."""

    submission_id: str
    status: str
    entrypoint: str
    message: str
    metadata: dict[str, str]
    start_time_ms: int | None
    end_time_ms: int | None
    driver_exit_code: int | None

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ENDED

    @property
    def exit_code(self) -> int:
        """The exit code of the job's own process; 0 while it runs, 130 if it was stopped, 75 if it never started."""
        if self.status == "STOPPED":
            return STOPPED_CODE
        if self.status != "FAILED":
            return 0
        code = self.driver_exit_code
        if code is None or code == 0:
            return NEVER_STARTED_CODE
        return code if code > 0 else 128 - code


class JobServer:
    """A connected job server."""

    def __init__(self, address: str | None) -> None:
        """Connects to `address`, by default to what RAY_API_SERVER_ADDRESS or RAY_ADDRESS name, or the local cluster.

        Raises:
            UnavailableError: nobody answers there.
            AccessDeniedError: it wants a token, or another one.
        """
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they tell each package that they upload
        with _explained(address or "the job server"), _address_alone(address):
            self._client = JobSubmissionClient(address)
        self.address: str = self._client.get_address()

    def submit(self, submission: Submission, resources: Resources, requirements: str | None = None) -> JobState | None:
        """None if the job was submitted now, else the state of the one that has its submission id already.

        Raises:
            ConfigError: the server refuses the job.
        """
        earlier = self.find(submission.submission_id)
        if earlier is not None:
            return earlier
        with working_folder(submission) as folder, _explained(self.address):
            try:
                self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=submission.submission_id,
                    runtime_env=runtime_env(folder, requirements),
                    metadata=dict(submission.metadata),
                    entrypoint_num_cpus=resources.num_cpus or None,
                    entrypoint_num_gpus=resources.num_gpus or None,
                    entrypoint_memory=resources.memory_bytes or None,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                return self.state(submission.submission_id)  # somebody else was faster
        return None

    def find(self, submission_id: str) -> JobState | None:
        """The job, None where there is none with this id."""
        try:
            return self.state(submission_id)
        except NotFoundError:
            return None

    def state(self, submission_id: str) -> JobState:
        """The job as it is now.

        Raises:
            NotFoundError: there is none with this id.
        """
        with _explained(self.address, submission_id):
            return _state_of(self._client.get_job_info(submission_id))

    def jobs(self) -> list[JobState]:
        """All submitted jobs that the cluster knows, newest first."""
        with _explained(self.address):
            found = [_state_of(job) for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time_ms or 0, reverse=True)

    def logs(self, submission_id: str) -> str:
        """Everything that the job has written so far."""
        self.state(submission_id)
        with _explained(self.address, submission_id):
            return self._client.get_job_logs(submission_id)

    def stop(self, submission_id: str) -> bool:
        """True if it ran and was told to stop: as by SIGTERM first, so what is committed is kept."""
        self.state(submission_id)
        with _explained(self.address, submission_id):
            return self._client.stop_job(submission_id)

    def watch(
        self,
        submission_id: str,
        *,
        write: Callable[[str], object] | None = None,
        on_status: Callable[[JobState], object] | None = None,
    ) -> JobState:
        """The job after its end; `write` gets its output as it comes, `on_status` each new state.

        A connection that breaks is made again: what was written already is not written twice.

        Raises:
            UnavailableError: the server is away for longer than `LOST_S`.
        """
        shown, lost_since, told = 0, None, ""
        while True:
            try:
                state = self.state(submission_id)
                if state.status != told and on_status is not None:
                    on_status(state)
                told, lost_since = state.status, None
                if write is not None and (state.status != "PENDING" or state.ended):
                    shown = asyncio.run(self._tail(submission_id, shown, write))
                    state = self.state(submission_id)
                if state.ended:
                    return state
            except UnavailableError:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_S:
                    raise
            time.sleep(POLL_S)

    async def _tail(self, submission_id: str, shown: int, write: Callable[[str], object]) -> int:
        """Writes what comes after the first `shown` characters of the output, until the connection ends."""
        import aiohttp

        seen = 0
        try:
            async for lines in self._client.tail_job_logs(submission_id):
                fresh = lines[max(shown - seen, 0) :]
                seen += len(lines)
                if fresh:
                    write(fresh)
        except (RuntimeError, aiohttp.ClientError, OSError):
            pass  # the caller looks at the state and comes again
        return max(seen, shown)


def _state_of(job: Any) -> JobState:
    return JobState(
        submission_id=str(job.submission_id),
        status=str(getattr(job.status, "value", job.status)),
        entrypoint=str(job.entrypoint),
        message=str(job.message or ""),
        metadata=dict(job.metadata or {}),
        start_time_ms=job.start_time,
        end_time_ms=job.end_time,
        driver_exit_code=job.driver_exit_code,
    )


@contextmanager
def _address_alone(address: str | None) -> Iterator[None]:
    """Inside, a given address counts, not the variables that Ray would take instead."""
    kept = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if address is not None and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _explained(address: str, submission_id: str = "") -> Iterator[None]:
    """Whatever Ray's client raises inside becomes one of our errors; no token is ever part of it."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except CnnRayError:
        raise
    except AuthenticationError as error:
        status = 401 if "required" in str(error).partition(":")[0] else 403
        raise _error_of(status, address, submission_id, "") from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise _error_of(status, address, submission_id, type(error).__name__) from None
    except RuntimeError as error:
        match = re.search(r"status code (\d{3})", str(error))
        raise _error_of(
            int(match[1]) if match else None, address, submission_id, " ".join(str(error).split())[:300]
        ) from None
    except ValueError as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"Expected a job that Ray takes. Received: {said}. Next: correct it.") from None


def _error_of(status: int | None, address: str, submission_id: str, said: str) -> CnnRayError:
    if status in (401, 403):
        what = "no token" if status == 401 else "a wrong token"
        return AccessDeniedError(
            f"Expected the token of the cluster at {address}. Received: {what} ({status}). Next: export "
            "RAY_AUTH_MODE=token, and put the cluster's token into ~/.ray/auth_token (mode 0600)."
        )
    if status == 404 and submission_id:
        return NotFoundError(f"Expected a job {submission_id} at {address}. Received: none. Next: cnn-ray submit list.")
    if status in (400, 500) and submission_id == "" and "status code" in said:
        return ConfigError(f"Expected a job that Ray takes. Received: {said}. Next: see the message.")
    return UnavailableError(
        f"Expected Ray's job server at {address}. Received: {said}. "
        "Next: check --address (http://HOST:8265) and that the tunnel (`ray dashboard cluster.yaml`) is open."
    )
