"""API keys: a file of hashes, changed by compare-and-swap, and the ring that tells whose key a request brought.

    key = add_key("s3://bucket/serve/keys.json", "nightly-triage")     # shown once; the file has its SHA-256 only
    ring = KeyRing.load("s3://bucket/serve/keys.json")
    ring.name_of(f"Bearer {key}")                                      # "nightly-triage"

A key is 256 random bits, made here and never chosen by a person. So a plain SHA-256 is enough: nobody finds the key
of a hash by guessing, however fast the hash is. A slow password hash would protect nothing more, and would let anyone
who sends wrong keys burn the endpoint's CPU.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import stat
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cnn_ray.config import ServeConfig
from cnn_ray.errors import CnnRayError, ConfigError, NotFoundError, UnavailableError
from cnn_ray.storage import open_store, split_uri

logger = logging.getLogger(__name__)

KEY_PREFIX = "cnnray_"
"""Every key begins with it, so that secret scanners and log filters know one when they see it."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MAX_HEADER_CHARS = 512
"""A longer Authorization header is no key of ours and is not hashed."""
MAX_FILE_BYTES = 1024 * 1024
_NEW_FILE_MODE = 0o600
_SWAP_ATTEMPTS = 100


class ApiKey(BaseModel):
    """One line of the key file. It does not hold the key, and the key cannot be found from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Who has the key: it is in the access log."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the key's text."""
    created_at: str
    """UTC, ISO 8601."""


class _KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[ApiKey, ...]

    @field_validator("keys")
    @classmethod
    def _distinct(cls, value: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        if len({key.name for key in value}) < len(value) or len({key.sha256 for key in value}) < len(value):
            raise ValueError("a name or a hash is there twice")
        return value


def new_key(name: str) -> tuple[str, ApiKey]:
    """A fresh key, `cnnray_` and 52 characters, with the record that recognises it.

    Raises:
        ConfigError: no name for a key.
    """
    key = KEY_PREFIX + base64.b32encode(secrets.token_bytes(32)).decode().rstrip("=").lower()
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return key, ApiKey(name=name, sha256=hashlib.sha256(key.encode()).hexdigest(), created_at=created_at)
    except ValidationError:
        raise ConfigError(
            f"Expected a name of at most 64 letters, digits, '.', '_' and '-'. Received: {name[:80]!r}. "
            "Next: name who will use the key, for instance nightly-triage."
        ) from None


def list_keys(keys_uri: str) -> tuple[ApiKey, ...]:
    """The records of the key file, in its order.

    Raises:
        ConfigError: the file is not a key file, or everybody may write it.
        StorageError: it cannot be read.
    """
    folder, name = split_uri(keys_uri)
    return _parse(_read(folder, name), keys_uri)


def add_key(keys_uri: str, name: str) -> str:
    """The text of a new key, whose hash is in the file now; this is the only time that it is seen.

    A file that is not there is made, for its owner alone. Running endpoints take the key within seconds.

    Raises:
        ConfigError: the name is taken or no name.
        StorageError: the file cannot be read or written.
    """
    key, record = new_key(name)

    def added(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        if record in keys:  # written by our attempt whose answer was lost
            return keys
        if any(other.name == name for other in keys):
            raise ConfigError(
                f"Expected a name that no key in {keys_uri} has. Received: {name}. "
                "Next: take another name, or remove the old key first."
            )
        return (*keys, record)

    _change(keys_uri, added)
    return key


def remove_key(keys_uri: str, name: str) -> None:
    """Nothing: the file has no key of that name any more, and running endpoints refuse it within seconds.

    Raises:
        ConfigError: there is none.
        StorageError: the file cannot be read or written.
    """
    seen: set[str] = set()

    def removed(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        left = tuple(key for key in keys if key.name != name)
        if len(left) == len(keys) and not seen:
            known = ", ".join(key.name for key in keys) or "none"
            raise ConfigError(
                f"Expected the name of a key in {keys_uri}. Received: {name} (known: {known}). Next: name one of these."
            )
        seen.add(name)
        return left

    _change(keys_uri, removed)


def _change(keys_uri: str, change: Callable[[tuple[ApiKey, ...]], tuple[ApiKey, ...]]) -> None:
    """The file holds `change` of what it held: compare-and-swap, so that two writers lose nothing of each other."""
    folder, name = split_uri(keys_uri)
    store = open_store(folder)
    for _ in range(_SWAP_ATTEMPTS):
        try:
            raw, token = store.get_versioned(name)
        except NotFoundError:
            raw, token = b'{"keys": []}', None
        before = _parse(raw, keys_uri)
        after = change(before)
        if after == before and token is not None:
            return
        data = (_KeyFile(keys=after).model_dump_json(indent=2) + "\n").encode()
        access = _access(store.uri_of(name))
        done = store.put_if_absent(name, data) if token is None else store.put_if_match(name, data, token) is not None
        if done:
            _give_access(store.uri_of(name), access)
            return
    raise UnavailableError(
        f"Expected to change {keys_uri}. Received: another writer each time. Next: try again when nobody else does."
    )


def _access(path: str) -> os.stat_result | None:
    """Who may do what with a local file that is there already, or None."""
    if "://" in path:
        return None
    try:
        return Path(path).stat()
    except OSError:
        return None


def _give_access(path: str, access: os.stat_result | None) -> None:
    """The local file is its owner's alone, or has the owner and mode that the file before it had.

    Without that, `sudo cnn-ray keys add` would take the file away from the user that the endpoint runs as.
    """
    if "://" in path:
        return
    Path(path).chmod(_NEW_FILE_MODE if access is None else stat.S_IMODE(access.st_mode))
    if access is not None:
        with suppress(PermissionError):  # only root gives files away
            os.chown(path, access.st_uid, access.st_gid)


def _read(folder: str, name: str) -> bytes:
    store = open_store(folder)
    raw = store.get(name, max_bytes=MAX_FILE_BYTES)
    access = _access(store.uri_of(name))
    if access is not None and access.st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"Expected a key file that not everybody may write. Received: mode {stat.S_IMODE(access.st_mode):o} of "
            f"{store.uri_of(name)}. Next: chmod o-w it, and look who has a key."
        )
    return raw


def _parse(raw: bytes, keys_uri: str) -> tuple[ApiKey, ...]:
    try:
        return _KeyFile.model_validate_json(raw).keys
    except ValidationError as error:
        # Neither values nor unknown fields: somebody may have put the key itself where its hash belongs.
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        number = next((part for part in first["loc"] if isinstance(part, int)), None)
        where = "in the file" if number is None else f"in key {number + 1} of the file"
        kind = "a name or a hash that is there twice" if first["type"] == "value_error" else "something else"
        raise ConfigError(
            f'Expected {{"keys": [{{"name", "sha256", "created_at"}}, ...]}} in {keys_uri}. '
            f"Received: {kind} {where}. Next: correct the file, or make it with `cnn-ray keys add`."
        ) from None


class KeyRing:
    """The keys that an endpoint takes. Thread-safe: `refresh` swaps one tuple, `name_of` reads it once."""

    def __init__(self, keys_uri: str, raw: bytes) -> None:
        """A ring with the keys of `raw`, the contents of the key file.

        Raises:
            ConfigError: not a key file.
        """
        self._uri = keys_uri
        self._folder, self._name = split_uri(keys_uri)
        self._lock = threading.Lock()
        self._raw = raw
        self._trouble = ""
        self._keys = _digests(_parse(raw, keys_uri))
        self._log_names("loaded")

    @classmethod
    def load(cls, keys_uri: str) -> KeyRing:
        """The ring of the key file.

        Raises:
            ConfigError: the file is not a key file, or everybody may write it.
            StorageError: it is missing or cannot be read.
        """
        return cls(keys_uri, _read(*split_uri(keys_uri)))

    def name_of(self, header: str | None) -> str | None:
        """Whose key the Authorization header brings, or None: no header, another scheme, too long, no such key.

        Every key of the ring is compared, in constant time each, whether or not an earlier one was right.
        """
        if header is None or len(header) > MAX_HEADER_CHARS:
            return None
        scheme, _, offered = header.partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = hashlib.sha256(offered.strip(" ").encode("utf-8", "surrogatepass")).digest()
        found: str | None = None
        for name, known in self._keys:
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def refresh(self) -> bool:
        """Whether the keys changed, because the file did. One small read, and never raises for what is in the file.

        A file that is damaged, gone or unreachable leaves the keys as they are: a storage outage must not lock every
        client out. It is logged once, not at each try.
        """
        with self._lock:
            try:
                raw = _read(self._folder, self._name)
                if raw == self._raw:
                    self._trouble = ""
                    return False
                keys = _digests(_parse(raw, self._uri))
            except CnnRayError as error:
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    logger.error("the API keys stay as they were: %s", error)
                return False
            self._raw, self._keys, self._trouble = raw, keys, ""
        self._log_names("changed")
        return True

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._keys)

    def _log_names(self, what: str) -> None:
        names = ", ".join(name for name, _ in self._keys)
        if names:
            logger.info("API keys %s: %s", what, names)
        else:
            logger.warning("API keys %s: there are none, so nobody is let in", what)


def _digests(keys: tuple[ApiKey, ...]) -> tuple[tuple[str, bytes], ...]:
    return tuple((key.name, bytes.fromhex(key.sha256)) for key in keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; names other than localhost count as reachable."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_local_request(headers: Mapping[str, str]) -> bool:
    """Whether the headers (names in lower case) ask this machine by its own name, and not for a web page of elsewhere.

    An endpoint without keys that listens on loopback is still within reach of every web page that somebody on this
    machine opens: the page sends requests there (cross-site), or gives its own name the address 127.0.0.1 and then
    reads the answers too (DNS rebinding, as in CVE-2025-62593 of Ray). Browsers say in Host and Origin who asks; other
    clients send no Origin.
    """
    host, origin = headers.get("host"), headers.get("origin")
    try:
        named = "localhost" if host is None else urlsplit(f"//{host}").hostname or ""
        return is_loopback(named) and (origin is None or urlsplit(origin).netloc == host)
    except ValueError:  # half an IPv6 address
        return False


def require_keys(host: str, config: ServeConfig) -> None:
    """Nothing: whoever reaches `host` needs a key, or is wanted without one.

    Raises:
        ConfigError: others reach the host, and neither api_keys_uri nor allow_anonymous is set.
    """
    if is_loopback(host) or config.api_keys_uri is not None or config.allow_anonymous:
        return
    raise ConfigError(
        f"Expected API keys for an endpoint that others reach. Received: host {host} without api_keys_uri. "
        "Next: `cnn-ray keys add NAME --keys keys.json` and --api-keys-uri keys.json, "
        "or --allow-anonymous to let everybody ask."
    )
