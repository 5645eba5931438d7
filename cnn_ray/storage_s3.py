# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from cnn_ray.errors import ChangedError, ConfigError, NotFoundError
from cnn_ray.storage_base import COPY_BYTES, ObjectInfo, Store, check_key, check_size, write_whole
from cnn_ray.storage_pages import ListingPage, parse_page
from cnn_ray.storage_ranges import RangeLister, start_at
from cnn_ray.storage_retry import attempts, error_of_s3, unavailable

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
CONNECTIONS = 64
QUICK_TRIES = 8
CREDENTIALS_TTL = timedelta(minutes=5)

_MODIFIED = re.compile(rb"<LastModified>([0-9T:.+Z-]+)</LastModified>")
_URI = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/([^\0]*))?", re.IGNORECASE)


class S3Store(Store):
    """A bucket, or a prefix in it. Etag is S3's without the quotes, and so is the token of `put_if_match`."""

    def __init__(self, uri: str) -> None:
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
        self._lock = threading.Lock()
        self._made: tuple[Any, Any] | None = None
        self._quick_answered = False
        self._quick_failures = 0

    def __reduce__(self) -> tuple[type[S3Store], tuple[str]]:
        """The location alone: clients hold sockets, locks and credentials, which must not travel."""
        return S3Store, (self.uri,)

    def _clients(self) -> tuple[Any, Any]:
        """boto3's client, and obstore's or None where only boto3 can speak to this server."""
        with self._lock:
            if self._made is None:
                client, credentials, path_style = _boto3_client()
                quick = _obstore(self._bucket, client, credentials) if credentials and path_style else None
                self._made = client, quick
            return self._made

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def _ask(self, operation: str, uri: str, **arguments: Any) -> Any:
        """boto3's answer, after as many attempts as it takes."""
        return attempts(lambda _: self._once(operation, **arguments), uri)

    def _once(self, operation: str, **arguments: Any) -> Any:
        return getattr(self._clients()[0], operation)(Bucket=self._bucket, **arguments)

    def list(self, prefix: str = "") -> Iterator[pa.Table]:
        """See `Store.list`. Long listings are read as ranges of names, several at once.

        Raises:
            StorageError: the server does not list in byte order (directory buckets).
        """
        return RangeLister(self._page, self._listed(prefix), self._root).tables()

    def page_at(self, name: str, prefix: str) -> ListingPage:
        """Return one page of the names that begin with `prefix`, from `name` on. Both are names in the bucket."""
        return self._page({"Prefix": prefix, **start_at(name)})

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
            return self._get_slow(name, uri, if_match, max_bytes)[0] if data is None else data

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
            check_size(uri, found.meta["size"], max_bytes)
            data = bytes(found.bytes())
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

    def _get_slow(self, name: str, uri: str, if_match: str | None, max_bytes: int | None) -> tuple[bytes, str]:
        match = {} if if_match is None else {"IfMatch": f'"{if_match}"'}
        found = self._once("get_object", Key=name, **match)
        body = found["Body"]
        try:
            check_size(uri, found["ContentLength"], max_bytes)
            return body.read(), _bare(found["ETag"])
        finally:
            body.close()

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """See `Store.get_versioned`."""
        name, uri = self._name(key), self.uri_of(key)
        return attempts(lambda _: self._get_slow(name, uri, None, None), uri)

    def head(self, key: str) -> ObjectInfo:
        """See `Store.head`."""
        found = self._ask("head_object", self.uri_of(key), Key=self._name(key))
        return ObjectInfo(_bare(found["ETag"]), found["ContentLength"])

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
        name, tries = self._name(key), list[int]()

        def write(attempt: int) -> str:
            tries.append(attempt)
            return _bare(self._once("put_object", Key=name, Body=data, **condition)["ETag"])

        try:
            return attempts(write, self.uri_of(key))
        except ChangedError:
            if len(tries) == 1:
                return None
            stored, etag = self.get_versioned(key)
            return etag if stored == data else None

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


def _boto3_client() -> tuple[Any, Any, bool]:
    """A client without retries of its own, the session's credentials or None, and whether it puts buckets in paths.

    Servers other than AWS rarely have a DNS name for each bucket, so they get paths unless the profile says otherwise.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config: Any = Config(
        max_pool_connections=CONNECTIONS,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session: Any = boto3.Session()
        client: Any = session.client("s3", config=config)
        options: Any = client.meta.config.s3
        configured: str | None = options.get("addressing_style") if options else None
        if configured is None and "amazonaws.com" not in client.meta.endpoint_url:
            client = session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
        # With the wildcard it comes before botocore's own `before-parse.s3.*`, which would parse the whole page.
        client.meta.events.register_first("before-parse.*.ListObjectsV2", _keep_page)
        return client, session.get_credentials(), configured in (None, "auto", "path")
    except BotoCoreError as error:
        raise error_of_s3(error, "S3") from error
    except ValueError as error:  # an endpoint that is no URL
        raise ConfigError(
            "Expected AWS settings that make an S3 client. Received: an invalid endpoint or region. "
            "Next: check AWS_ENDPOINT_URL and ~/.aws/config."
        ) from error


def _obstore(bucket: str, client: Any, credentials: Any) -> Any:
    """obstore's client for the same server, region and credentials; it never retries, `attempts` does."""
    from obstore.store import S3Store as Quick

    def frozen() -> dict[str, Any]:
        now = credentials.get_frozen_credentials()
        expires_at = datetime.now(UTC) + CREDENTIALS_TTL
        keys = {"access_key_id": now.access_key, "secret_access_key": now.secret_key, "token": now.token}
        return keys | {"expires_at": expires_at}

    region = client.meta.region_name
    make: Any = Quick
    return make(
        bucket,
        endpoint=client.meta.endpoint_url,
        region="us-east-1" if region in (None, "aws-global") else region,
        virtual_hosted_style_request=False,
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
            "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
            "timeout": timedelta(seconds=10 * READ_TIMEOUT_S),
        },
        retry_config={"max_retries": 0},
        credential_provider=frozen,
    )


def _keep_page(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Takes a listing page out of botocore's hands, whose parser takes 50 ms for it, and leaves it an empty one.

    The answer holds the XML as `Page`. An error in a 200 answer stays: botocore knows those.
    """
    body = response_dict["body"]
    if response_dict["status_code"] == 200 and b"<Error" not in body[:500]:
        customized_response_dict["Page"] = body
        response_dict["body"] = b"<ListBucketResult/>"


def _bare(etag: str) -> str:
    return etag.strip('"')
