"""Every error that a user can meet, each with its exit code and HTTP status.

Facts are class attributes and `__init__` takes one message, so an error pickles across Ray unchanged.
A message keeps one grammar: "Expected ... Received: ... Next: ...". Row failures are not here: they are
values (`cnn_ray.records.RowFailure`), because one bad file must never end a night.
"""

from __future__ import annotations

from typing import ClassVar


class CnnRayError(Exception):
    """Base of all errors with a message for the user; the rest is a bug (exit code 1)."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    agreed: bool = False
    """All ranks of a training raise this very error."""


class ConfigError(CnnRayError):
    """Configuration or usage is wrong: nothing was started."""

    exit_code = 2
    http_status = 400


class DataError(ConfigError):
    """Training data or a manifest does not have the promised form."""


class NoImagesError(DataError):
    """The input is there and holds no image to be scored."""


class GuardError(ConfigError):
    """A guard found one of the well-known mistakes; `--allow NAME` overrides it."""


class ArtifactError(CnnRayError):
    """A model is missing, damaged, or not what its artifact.json says."""

    exit_code = 3


class PromotionRefusedError(ArtifactError):
    """The release gate: the version is worse than the one that the alias means now."""


class PlanError(CnnRayError):
    """A plan, part or manifest in the output is damaged or contradicts another one."""

    exit_code = 3


class QuarantineLimitError(CnnRayError):
    """More rows than allowed could not be scored; the manifest says `quarantine_limit`."""

    exit_code = 4


class StorageError(CnnRayError):
    """Storage refused for good: another try with the same configuration ends the same way."""

    exit_code = 2


class NotFoundError(StorageError):
    """The object or bucket does not exist."""

    http_status = 404


class AccessDeniedError(StorageError):
    """The credentials are good but do not allow this."""


class CredentialsError(StorageError):
    """Credentials are missing, wrong, or the clock is too far off for a signature."""


class ChangedError(StorageError):
    """The object is no longer the one that was asked for (its etag differs)."""


class ArchivedError(StorageError):
    """The object lies in an archive of the storage and cannot be read before it is restored."""


class ServerLacksError(StorageError):
    """The storage's server lacks something that exactly-once results need, such as conditional writes."""


class EncodedError(StorageError):
    """The object is stored with a Content-Encoding that is not read."""


class DamagedError(StorageError):
    """The bytes of the object are not what its Content-Encoding promises."""


class TooLargeError(StorageError):
    """The object has more bytes than the caller allows."""


class UnavailableError(StorageError):
    """Storage did not answer in time, throttled, or the credentials have expired: try again later."""

    exit_code = 75
    retryable = True


class BusyError(CnnRayError):
    """Somebody else holds the lease on this output."""

    exit_code = 75
    retryable = True


class RunInterruptedError(CnnRayError):
    """Ctrl-C or SIGTERM: what is committed stays, the same command goes on from there."""

    exit_code = 130
    retryable = True


class TrainingError(CnnRayError):
    """Training ended without a model: a worker failed too often or a collective timed out."""

    exit_code = 75
    retryable = True
