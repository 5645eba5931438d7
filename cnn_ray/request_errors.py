# pyright: strict
"""What can be wrong with an HTTP request, each with its status; the message goes out as {"error": ...}.

Two protocols and the endpoint around them raise these, so they have a module of their own.
"""

from __future__ import annotations

from typing import ClassVar

from cnn_ray.errors import CnnRayError


class RequestError(CnnRayError):
    """The client's request cannot be answered; the message goes out as {"error": ...}."""

    http_status: ClassVar[int] = 400


class UnauthorizedError(RequestError):
    """The request brings no API key, or one that is not known here."""

    http_status: ClassVar[int] = 401


class ForbiddenError(RequestError):
    """The request comes from a web page elsewhere, or asks this server under a name that is not its own."""

    http_status: ClassVar[int] = 403


class UnknownModelError(RequestError):
    """The request is about a model, version or path that is not served here."""

    http_status: ClassVar[int] = 404


class UnknownLabelError(UnknownModelError):
    """No such version label (our aliases): TensorFlow Serving calls that an invalid argument, not a missing model."""

    http_status: ClassVar[int] = 400


class MethodError(RequestError):
    """The path exists but not with this HTTP method; `allow` is for the header of that name."""

    http_status: ClassVar[int] = 405
    allow: str = "GET, HEAD"


class BodyTimeoutError(RequestError):
    """The body did not arrive in time."""

    http_status: ClassVar[int] = 408


class BodyTooLargeError(RequestError):
    """The body has more bytes than one request may bring."""

    http_status: ClassVar[int] = 413


class UnsupportedTypeError(RequestError):
    """The body is of an image type that is not read here."""

    http_status: ClassVar[int] = 415


class EncodingError(UnsupportedTypeError):
    """The body has a Content-Encoding that is not read here."""


class OverloadedError(RequestError):
    """More requests than can be answered now: the client may come again soon."""

    http_status: ClassVar[int] = 429
    retryable: ClassVar[bool] = True


class DeadlineError(RequestError):
    """The answer was not there before the request's deadline."""

    http_status: ClassVar[int] = 504
    retryable: ClassVar[bool] = True
