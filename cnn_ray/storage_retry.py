# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
"""What S3 and the network say, as our errors; and the only retry loop, for all of `cnn_ray.storage_s3`.

Codes decide, not texts: S3's texts quote keys, signatures and request headers, so none of them reaches a message.
"""

from __future__ import annotations

import math
import random
import re
import ssl
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from cnn_ray.errors import (
    AccessDeniedError,
    ArchivedError,
    CnnRayError,
    ConfigError,
    CredentialsError,
    NotFoundError,
    ServerLacksError,
    StorageError,
    UnavailableError,
)
from cnn_ray.storage_base import changed, error_of_os

ATTEMPTS = 10
"""Where one request in five fails, ten attempts in a row fail once in ten million requests."""
RETRY_TOTAL_S = 60.0
"""No attempt begins later than this after the first one. The waits below add up to 20 s on average, 40 s at most, so
the limit is for slow attempts (30 s without a byte end one): an outage ends a run in two minutes."""
BACKOFF_BASE_S = 0.25
BACKOFF_MAX_S = 8.0

T = TypeVar("T")

_CREDENTIAL_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
    "InvalidToken",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "AuthorizationHeaderMalformed",
}
_REGION_CODES = {
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "TemporaryRedirect",
    "IllegalLocationConstraintException",
    "301",
    "307",
}
_TRANSIENT_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "ConditionalRequestConflict",
    "OperationAborted",
    "IncompleteBody",
    "InternalError",
    "ServiceUnavailable",
}
_NOT_FOUND_CODES = {"NoSuchKey", "NoSuchBucket", "NotFound"}
_ARCHIVED_CODES = {"InvalidObjectState", "ObjectNotInActiveTierError"}
_NOT_IMPLEMENTED_CODES = {"NotImplemented", "XNotImplemented", "MethodNotAllowed", "501", "405"}
_CODE = re.compile(r"[A-Za-z0-9.]{1,64}")
_REGION = re.compile(r"[a-z0-9-]{1,40}")
_EXPECTED_REGION = re.compile(r"expecting '([^']+)'")


_patience_s: ContextVar[float] = ContextVar("patience_s", default=math.inf)


@contextmanager
def patience(seconds: float) -> Generator[None]:
    """Inside, this thread begins no attempt later than `seconds` after the first one: somebody waits at a prompt."""
    token = _patience_s.set(seconds)
    try:
        yield
    finally:
        _patience_s.reset(token)


def attempts(call: Callable[[int], T], uri: str) -> T:
    """What `call(attempt)` returns, tried again with exponential backoff and full jitter while that can help.

    Full jitter, because thousands of workers that were throttled together must not come back together.

    Raises:
        UnavailableError: `ATTEMPTS` failed, or the next one would begin after `RETRY_TOTAL_S`.
        CnnRayError: whatever no second attempt can mend, at once.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    deadline = time.monotonic() + min(RETRY_TOTAL_S, _patience_s.get())
    attempt = 1
    while True:
        try:
            return call(attempt)
        except (BotoCoreError, ClientError, HTTPError, CnnRayError, OSError) as error:
            explained = error if isinstance(error, CnnRayError) else error_of_s3(error, uri)
            wait_s = random.uniform(0, min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2 ** (attempt - 1)))
            if not explained.retryable or attempt >= ATTEMPTS or time.monotonic() + wait_s > deadline:
                if explained is error:
                    raise
                raise explained from error
        time.sleep(wait_s)
        attempt += 1


def unavailable(uri: str, said: str) -> UnavailableError:
    """The error for a storage that did not answer for now."""
    return UnavailableError(f"Expected an answer about {uri}. Received: {said}. Next: try again later.")


def error_of_s3(error: Exception, uri: str) -> CnnRayError:
    """The error that a user meets for what botocore or the network said about `uri`."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    match error:
        case exceptions.ClientError():
            said: Any = error
            response = said.response
            code, status = str(response["Error"].get("Code", "")), response["ResponseMetadata"].get("HTTPStatusCode", 0)
            region = region_of_answer(response)
            if region is not None and (code in _REGION_CODES or status in (301, 307)):
                return StorageError(
                    f"Expected requests for {uri} to go to the bucket's region, {region}. Received: {_shown(code)}, "
                    f"because another one is set. Next: export AWS_DEFAULT_REGION={region} on every node, or set "
                    f"region = {region} in ~/.aws/config."
                )
            return _error_of_answer(_shown(code), int(status), uri)
        case (
            exceptions.NoCredentialsError()
            | exceptions.PartialCredentialsError()
            | exceptions.CredentialRetrievalError()
            | exceptions.SSOError()
            | exceptions.TokenRetrievalError()
            | exceptions.ProfileNotFound()
            | exceptions.LoginError()
        ):
            return CredentialsError(
                f"Expected AWS credentials for {uri}. Received: {type(error).__name__}. "
                "Next: set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in again."
            )
        case exceptions.SSLError() if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return StorageError(
                f"Expected a trusted certificate from the server of {uri}. Received: another one. "
                "Next: check AWS_ENDPOINT_URL, or name your authority's file in AWS_CA_BUNDLE."
            )
        case exceptions.ParamValidationError() | exceptions.InvalidConfigError() | exceptions.ConfigParseError():
            return ConfigError(
                f"Expected a valid request for {uri}. Received: {type(error).__name__}. "
                "Next: check the bucket name, the key's length and ~/.aws/config."
            )
        # botocore's time-outs and TLS failures are OSErrors too, and no failures of a disk
        case OSError() if not isinstance(
            error, ConnectionError | TimeoutError | ssl.SSLError | exceptions.BotoCoreError | HTTPError
        ):
            return error_of_os(error, str(error.filename or uri))
        case _:
            return unavailable(uri, f"{type(error).__name__}")


def region_of_answer(response: Mapping[str, Any]) -> str | None:
    """Return the region that an answer of S3 names as the bucket's own, None where it names none."""
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    error = response.get("Error", {})
    expected = _EXPECTED_REGION.search(str(error.get("Message", "")))
    named = headers.get("x-amz-bucket-region") or error.get("Region") or (expected[1] if expected else "")
    return str(named) if _REGION.fullmatch(str(named)) else None


def _shown(code: str) -> str:
    return code if _CODE.fullmatch(code) else "an unreadable code"


def _error_of_answer(code: str, status: int, uri: str) -> StorageError:
    """The error for an answer of S3; HEAD has no body, so there the status is all that is known."""
    if code in _ARCHIVED_CODES:
        return ArchivedError(
            f"Expected an object that can be read at {uri}. Received: one in an archive storage class ({code}). "
            "Next: restore it (aws s3api restore-object), wait until that is done, and run again."
        )
    if code in _NOT_IMPLEMENTED_CODES or status in (405, 501):
        return ServerLacksError(
            f"Expected a server that implements what was asked of {uri}. Received: {code} ({status}). "
            "Next: check AWS_ENDPOINT_URL, or use a server that implements the S3 protocol."
        )
    if code in _CREDENTIAL_CODES:
        return CredentialsError(
            f"Expected credentials and a clock that the storage of {uri} accepts. Received: {code}. "
            "Next: check the access key, the region and the system time."
        )
    if code in _TRANSIENT_CODES or status in (408, 409, 429) or status >= 500:
        return unavailable(uri, f"{code} ({status})")
    if code in _NOT_FOUND_CODES or status == 404:
        what = "an existing bucket in" if code == "NoSuchBucket" else "an object at"
        return NotFoundError(f"Expected {what} {uri}. Received: {code} ({status}). Next: check the location.")
    if status in (304, 412):
        return changed(uri)
    if status in (401, 403):
        return AccessDeniedError(
            f"Expected permission for {uri}. Received: {code} ({status}). "
            "Next: check the policies of the user or role and of the bucket; buckets of others may want "
            "--request-payer, or --sse for what is written."
        )
    return StorageError(f"Expected {uri} to be read or written. Received: {code} ({status}). Next: see the S3 codes.")
