# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""S3 and what speaks its protocol, for `cnn_ray.storage`.

boto3 does everything, because it reads every credential source, profile and endpoint setting; except two hot spots.
GET of 50 KB, 16 threads, 2 shared cores at load 3, one run against a socket server that always answers alike: obstore
2,700/s at 0.27 ms CPU, boto3 330/s at 2.8 ms. So a GET's first attempt is obstore's; whatever goes wrong, boto3 asks
again and explains. Listing pages are parsed in `cnn_ray.storage_pages`, because botocore's parser takes 50 ms for 1,000
keys. obstore's own listing promises no order and stops at keys such as "a/./b".
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.config import StorageConfig
from cnn_ray.content_encoding import decoded
from cnn_ray.errors import ChangedError, ConfigError, NotFoundError, ServerLacksError
from cnn_ray.storage_base import (
    CONDITIONS_ADVICE,
    COPY_BYTES,
    ObjectInfo,
    Store,
    changed,
    check_key,
    check_size,
    write_whole,
)
from cnn_ray.storage_clients import make_clients
from cnn_ray.storage_pages import ListingPage, parse_page
from cnn_ray.storage_ranges import RangeLister, start_at
from cnn_ray.storage_retry import attempts, unavailable

QUICK_TRIES = 8
NO_ETAG, WEAK_ETAG = ("none", "^$"), ("a weak one (W/...)", "^[Ww]/")
"""ETags that no condition can name: what a message says of them, and what they look like."""

_MODIFIED = re.compile(rb"<LastModified>([0-9T:.+Z-]+)</LastModified>")
_URI = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/([^\0]*))?", re.IGNORECASE)


class S3Store(Store):
    """A bucket, or a prefix in it. Etag is S3's without the quotes, and so is the token of `put_if_match`."""

    def __init__(self, uri: str, options: StorageConfig | None = None) -> None:
        """Parses `uri`; clients are made at the first request of each process.

        Raises:
            ConfigError: no valid bucket name in it (which may be a password, so the message does not repeat it).
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise ConfigError(
                "Expected s3://bucket/prefix. Received: no valid bucket name. Next: correct the location."
            )
        self._bucket = match[1]
        self._prefix = (match[2] or "").strip("/")
        if self._prefix:
            check_key(self._prefix)
        self.uri = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self.options = options or StorageConfig()
        self._reads, self._writes = _headers_of(self.options)
        self._compares_etags = False
        self._lock = threading.Lock()
        self._made: tuple[Any, Any] | None = None
        self._quick_answered = False
        self._quick_failures = 0

    def __reduce__(self) -> tuple[type[S3Store], tuple[str, StorageConfig]]:
        """The location and its options: clients hold sockets, locks and credentials, which must not travel."""
        return S3Store, (self.uri, self.options)

    def _clients(self) -> tuple[Any, Any]:
        """boto3's client, and obstore's or None where only boto3 can speak to this server."""
        with self._lock:
            if self._made is None:
                self._made = make_clients(self._bucket, self.options)
            return self._made

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def _ask(self, operation: str, uri: str, **arguments: Any) -> Any:
        """boto3's answer, after as many attempts as it takes."""
        return attempts(lambda _: self._once(operation, **arguments), uri)

    def _once(self, operation: str, **arguments: Any) -> Any:
        headers = self._writes if operation == "put_object" else self._reads
        return getattr(self._clients()[0], operation)(Bucket=self._bucket, **headers, **arguments)

    def list(self, prefix: str = "") -> Iterator[pa.Table]:
        """See `Store.list`. Long listings are read as ranges of names, several at once.

        Raises:
            StorageError: the server does not list in byte order (directory buckets).
            ServerLacksError: the server lists objects without ETags, or with weak ones.
        """
        for table in RangeLister(self._page, self._listed(prefix), self._root).tables():
            self._require_etags(table, NO_ETAG, WEAK_ETAG)
            yield table

    def page_at(self, name: str, prefix: str) -> ListingPage:
        """Return one page of the names that begin with `prefix`, from `name` on. Both are names in the bucket.

        Where the server lists no ETags, they are empty.
        """
        page = self._page({"Prefix": prefix, **start_at(name)})
        self._require_etags(page.table, WEAK_ETAG)
        return page

    def _require_etags(self, table: pa.Table, *refused: tuple[str, str]) -> None:
        for kind, pattern in refused:
            if pc.any(pc.match_substring_regex(table["etag"], pattern)).as_py():
                raise _lacks_etag(self.uri, kind)

    def keys(self, prefix: str = "") -> list[str]:
        """See `Store.keys`.

        Raises:
            NotFoundError: the bucket does not exist, which no first run explains, unlike a missing local folder.
        """
        arguments = {"Prefix": self._listed(prefix)}
        start, keys = len(self.uri) + 1, list[str]()
        while True:
            page = self._page(arguments)
            keys += [uri[start:] for uri in page.table["uri"].to_pylist()]
            if page.token is None:
                return keys
            arguments = {"Prefix": arguments["Prefix"], "ContinuationToken": page.token}

    def newest_s(self, prefix: str = "") -> float | None:
        """See `Store.newest_s`. Folder markers count: they are written with the folder.

        Raises:
            NotFoundError: the bucket does not exist.
        """
        arguments = {"Prefix": self._listed(prefix)}
        newest = b""
        while True:
            body = self._ask("list_objects_v2", self.uri, **arguments)["Page"]
            newest = max([newest, *_MODIFIED.findall(body)])
            token = parse_page(body, self._root).token
            if token is None:
                return datetime.fromisoformat(newest.decode()).timestamp() if newest else None
            arguments["ContinuationToken"] = token

    @property
    def _root(self) -> str:
        return f"s3://{self._bucket}/"

    def _listed(self, prefix: str) -> str:
        """What names begin with whose key begins with `prefix`."""
        if prefix:
            check_key(prefix)
        return f"{self._prefix}/{prefix}" if self._prefix else prefix

    def _page(self, arguments: dict[str, Any]) -> ListingPage:
        folder = f"{self._prefix}/" if self._prefix else ""

        def ask(_: int) -> ListingPage:
            return parse_page(self._once("list_objects_v2", **arguments)["Page"], self._root, folder)

        return attempts(ask, self.uri)

    def get(self, key: str, *, if_match: str | None = None, max_bytes: int | None = None) -> bytes:
        """See `Store.get`."""
        name, uri = self._name(key), self.uri_of(key)

        def fetch(attempt: int) -> bytes:
            data = self._get_quick(name, uri, if_match, max_bytes) if attempt == 1 else None
            if data is not None:
                return data
            found = self._get_slow(name, uri, if_match, max_bytes)
            return decoded(found["Bytes"], found.get("ContentEncoding"), uri, max_bytes)

        return attempts(fetch, uri)

    def _get_quick(self, name: str, uri: str, if_match: str | None, max_bytes: int | None) -> bytes | None:
        """The bytes through obstore, or None where boto3 must explain what is wrong.

        An obstore that failed `QUICK_TRIES` times before it ever answered does not fit this server (another region, its
        own certificate, a proxy) and is dropped for good: boto3 is slower, never wrong. One failure proves nothing.
        """
        quick = self._clients()[1]
        if quick is None or name.startswith("/") or name.endswith("/"):  # obstore drops those slashes
            return None
        import obstore
        from obstore import exceptions

        try:
            found = obstore.get(quick, name, options={} if if_match is None else {"if_match": f'"{if_match}"'})
            if if_match is not None and _bare(found.meta["e_tag"]) != if_match:
                return None
            check_size(uri, found.meta["size"], max_bytes)
            data = decoded(bytes(found.bytes()), found.attributes.get("Content-Encoding"), uri, max_bytes)
        except (FileNotFoundError, exceptions.PreconditionError):
            self._quick_answered = True
            return None
        except (exceptions.BaseError, ValueError) as error:
            self._quick_failures += not isinstance(error, ValueError)
            if not self._quick_answered and self._quick_failures >= QUICK_TRIES:
                self._made = self._clients()[0], None
            if isinstance(error, exceptions.GenericError):
                raise unavailable(uri, "no complete answer") from error
            return None
        self._quick_answered = True
        return data

    def _get_slow(self, name: str, uri: str, if_match: str | None, max_bytes: int | None) -> dict[str, Any]:
        """boto3's answer with the body as `Bytes`.

        Raises:
            ChangedError: the etag of the answer is not `if_match`: some servers ignore the condition.
            TooLargeError: the body is larger, and was not read.
        """
        found = self._open(name, if_match)
        body = found["Body"]
        try:
            if if_match is not None and _bare(found.get("ETag")) != if_match:
                raise changed(uri)
            check_size(uri, found["ContentLength"], max_bytes)
            return found | {"Bytes": body.read()}
        finally:
            body.close()

    def _open(self, name: str, if_match: str | None) -> dict[str, Any]:
        """The answer to a GET of the version that `if_match` names.

        Some servers refuse the If-Match of the very ETag that they tell. Then the condition is left out from now on,
        because `_get_slow` compares the ETags itself.
        """
        from botocore.exceptions import ClientError

        if if_match is None or self._compares_etags:
            return self._once("get_object", Key=name)
        try:
            return self._once("get_object", Key=name, IfMatch=f'"{if_match}"')
        except ClientError as error:
            said: Any = error
            refused = said.response["ResponseMetadata"].get("HTTPStatusCode") == 412
            if not refused or _bare(self._once("head_object", Key=name).get("ETag")) != if_match:
                raise
        self._compares_etags = True
        return self._once("get_object", Key=name)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """See `Store.get_versioned`."""
        name, uri = self._name(key), self.uri_of(key)
        found = attempts(lambda _: self._get_slow(name, uri, None, None), uri)
        return found["Bytes"], _strong(found, self.uri)

    def head(self, key: str) -> ObjectInfo:
        """See `Store.head`."""
        found = self._ask("head_object", self.uri_of(key), Key=self._name(key))
        return ObjectInfo(_strong(found, self.uri), found["ContentLength"])

    def check_etag(self, key: str) -> None:
        """See `Store.check_etag`."""
        name, uri = self._name(key), self.uri_of(key)
        page = self._page({"Prefix": name, "MaxKeys": 1})
        listed = {str(row["uri"]): str(row["etag"]) for row in page.table.to_pylist()}.get(uri)
        answered = self.head(key).etag
        if listed is not None and listed != answered:
            raise ServerLacksError(
                f"Expected the same ETag of {uri} in listings and in answers. Received: {listed[:80]!r} and "
                f"{answered[:80]!r}. Next: {CONDITIONS_ADVICE}"
            )

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put`."""
        self._ask("put_object", self.uri_of(key), Key=self._name(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`."""
        return self._put_conditional(key, data, IfNoneMatch="*") is not None

    def put_if_match(self, key: str, data: bytes, version: str) -> str | None:
        """See `Store.put_if_match`."""
        try:
            return self._put_conditional(key, data, IfMatch=f'"{version}"')
        except NotFoundError:
            return None

    def _put_conditional(self, key: str, data: bytes, **condition: str) -> str | None:
        """Etag of what is stored now, or None if the condition did not hold.

        The trap: an attempt succeeds, its answer is lost, and the next attempt meets its own object. So after a second
        attempt a refusal is believed only if the stored bytes are not ours.
        """
        name, uri, tries = self._name(key), self.uri_of(key), list[int]()

        def write(attempt: int) -> Any:
            tries.append(attempt)
            return self._once("put_object", Key=name, Body=data, **condition)

        try:
            answer = attempts(write, uri)
        except ChangedError:
            if len(tries) == 1:
                return None
            stored, etag = self.get_versioned(key)
            return etag if stored == data else None
        except ServerLacksError as error:
            header = "If-None-Match" if "IfNoneMatch" in condition else "If-Match"
            raise ServerLacksError(
                f"Expected a server with conditional writes for {self.uri}. Received: {header} is not implemented "
                f"there. Next: {CONDITIONS_ADVICE}"
            ) from error
        return _strong(answer, self.uri)

    def get_to_file(self, key: str, path: Path) -> None:
        """See `Store.get_to_file`."""

        def fetch(_: int) -> None:
            body = self._once("get_object", Key=self._name(key))["Body"]
            try:
                write_whole(path, lambda target: shutil.copyfileobj(body, target, COPY_BYTES))
            finally:
                body.close()

        attempts(fetch, self.uri_of(key))

    def put_file(self, key: str, path: Path) -> None:
        """See `Store.put_file`. One PUT, whose limit of 5 GiB is far above any classifier."""

        def send(_: int) -> None:
            with path.open("rb") as file:
                self._once("put_object", Key=self._name(key), Body=file)

        attempts(send, self.uri_of(key))

    def delete(self, key: str) -> None:
        """See `Store.delete`. In a bucket with versions the object gets a delete marker."""
        self._ask("delete_object", self.uri_of(key), Key=self._name(key))

    def server_date(self) -> str | None:
        """The server's clock as its answer's Date header says it, also where it refuses ours; None if it says none.

        Raises:
            StorageError: there is no answer.
        """
        from botocore.exceptions import ClientError

        def ask(_: int) -> dict[str, Any]:
            try:
                return self._once("list_objects_v2", Prefix=self._prefix, MaxKeys=1)
            except ClientError as error:
                said: Any = error
                return said.response

        return attempts(ask, self.uri)["ResponseMetadata"].get("HTTPHeaders", {}).get("date")

    def check_writable(self) -> None:
        """See `Store.check_writable`. Lists one key: the permission of HeadBucket, but refusals come with a reason."""
        self._ask("list_objects_v2", self.uri, Prefix=self._prefix, MaxKeys=1)


def _headers_of(options: StorageConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Arguments of boto3 for every request, and those for a PUT."""
    payer = {} if options.request_payer is None else {"RequestPayer": options.request_payer}
    named = {"ServerSideEncryption": options.sse, "SSEKMSKeyId": options.sse_kms_key_id}
    return payer, payer | {name: value for name, value in named.items() if value is not None}


def _bare(etag: str | None) -> str:
    """The ETag without quotes and without the mark of a weak one."""
    return (etag or "").removeprefix("W/").strip('"')


def _strong(answer: Any, uri: str) -> str:
    """The bare ETag of an answer, which conditions can name.

    Raises:
        ServerLacksError: there is none, or a weak one, which If-Match never matches (RFC 9110, 13.1.1).
    """
    etag = str(answer.get("ETag") or "").strip('"')
    for kind, pattern in (NO_ETAG, WEAK_ETAG):
        if re.match(pattern, etag):
            raise _lacks_etag(uri, kind)
    return etag


def _lacks_etag(uri: str, kind: str) -> ServerLacksError:
    return ServerLacksError(
        f"Expected a strong ETag from the server of {uri}. Received: {kind}. Next: {CONDITIONS_ADVICE}"
    )
