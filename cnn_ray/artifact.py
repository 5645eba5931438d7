"""The model bundle `<models_uri>/<name>/<version>/`, its versions and its aliases. Reading it needs no TensorFlow.

`artifact.json` is written last and holds the digest of every other file, so a version that has one is whole.
Versions are written by `cnn_ray.export.publish_artifact`, which needs the predictor to measure the engines.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cnn_ray.config import REFERENCE_PATTERN, ModelDefinition
from cnn_ray.errors import ArtifactError, ConfigError, NotFoundError
from cnn_ray.storage import Store, open_store
from cnn_ray.user_folders import cache_folder

FORMAT = 1
DESCRIPTION = "artifact.json"
WEIGHTS = "model.weights.h5"
OPENVINO_FILES = ("openvino/model.xml", "openvino/model.bin")


class FileRecord(BaseModel):
    """Digest and size of one file of a version."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: str
    size_bytes: int


class EngineFigures(BaseModel):
    """How one engine and precision answered on real validation images, against Keras in float32."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_abs_diff: float
    flips: int
    images: int
    accuracy: float
    allowed: bool


class ArtifactDescription(BaseModel):
    """What artifact.json holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    name: str
    version: int
    definition: ModelDefinition
    labels: tuple[str, ...]
    size_px: tuple[int, int]
    resize_rule: str
    positive_label: str | None
    threshold: float
    calibration: dict[str, Any] | None = None
    """How threshold and temperature were fitted; None: as configured for the training."""
    files: dict[str, FileRecord]
    engines: dict[str, dict[str, EngineFigures]]
    """engine -> precision -> figures"""
    training: dict[str, Any]
    libraries: dict[str, str]
    created_at: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """One version of a model: where it lies, what it says of itself, and the digest that pins it in plans."""

    uri: str
    digest: str
    description: ArtifactDescription = field(repr=False)

    @property
    def name(self) -> str:
        """Model name."""
        return self.description.name

    @property
    def version(self) -> int:
        """Version, a positive integer."""
        return self.description.version

    @property
    def reference(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the scores."""
        return self.description.labels

    @property
    def size_px(self) -> tuple[int, int]:
        """Model input (height, width)."""
        return self.description.size_px

    @property
    def positive_label(self) -> str | None:
        """The class that `flagged` is about, or None."""
        return self.description.positive_label

    @property
    def threshold(self) -> float:
        """Score of the positive label from which a row is flagged."""
        return self.description.threshold


def split_reference(reference: str) -> tuple[str, str]:
    """(name, version or alias) of NAME@VERSION or NAME@ALIAS.

    Raises:
        ConfigError: the text is neither.
    """
    if not re.match(REFERENCE_PATTERN, reference):
        raise ConfigError(
            f"Expected NAME@VERSION or NAME@ALIAS. Received: {reference!r}. Next: see `cnn-ray model list`."
        )
    name, _, version = reference.partition("@")
    return name, version


def resolve_reference(models_uri: str, reference: str) -> tuple[str, int]:
    """(name, version) that the reference means now; an alias is looked up in aliases.json.

    Raises:
        ConfigError: not a reference.
        ArtifactError: no such alias.
    """
    name, version = split_reference(reference)
    if version.isdigit():
        return name, int(version)
    aliases = read_aliases(models_uri, name)
    if version not in aliases:
        known = ", ".join(sorted(aliases)) or "none"
        raise ArtifactError(
            f"Expected an alias of model {name} in {models_uri}. Received: {version} (known: {known}). "
            f"Next: name a version, see `cnn-ray model list --models-uri {models_uri}`."
        )
    return name, aliases[version]


def load_artifact(models_uri: str, reference: str) -> Artifact:
    """The artifact that the reference means, its description checked; its files are checked when they are fetched.

    Raises:
        ArtifactError: no such version, or artifact.json is damaged.
    """
    name, version = resolve_reference(models_uri, reference)
    store = open_store(f"{models_uri.rstrip('/')}/{name}/{version}")
    try:
        raw = store.get(DESCRIPTION)
    except NotFoundError:
        raise ArtifactError(
            f"Expected model {name}@{version} in {models_uri}. Received: no {DESCRIPTION} there. "
            f"Next: see `cnn-ray model list --models-uri {models_uri}`."
        ) from None
    return Artifact(uri=store.uri, digest=hashlib.sha256(raw).hexdigest(), description=_parse(raw, store, version))


def _parse(raw: bytes, store: Store, version: int) -> ArtifactDescription:
    try:
        description = ArtifactDescription.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise ArtifactError(
            f"Expected a whole {DESCRIPTION} in {store.uri}. Received: {where}: {first['msg']}. "
            "Next: publish the model again; a version is never edited."
        ) from None
    problem = _contradiction(description, version)
    if problem is not None:
        raise ArtifactError(f"{problem} In {store.uri_of(DESCRIPTION)}. Next: publish the model again.")
    return description


def _contradiction(description: ArtifactDescription, version: int) -> str | None:
    labels = description.labels
    if description.format != FORMAT:
        return f"Expected artifact format {FORMAT}. Received: {description.format}."
    if description.version != version:
        return f"Expected version {version}, as the folder says. Received: {description.version}."
    if len(labels) < 2 or len(set(labels)) != len(labels):
        return f"Expected two or more different labels. Received: {list(labels)}."
    if description.positive_label is not None and description.positive_label not in labels:
        return f"Expected positive_label to be one of the labels. Received: {description.positive_label!r}."
    missing = {WEIGHTS, *OPENVINO_FILES} - description.files.keys()
    if missing:
        return f"Expected digests of all files. Received: none for {', '.join(sorted(missing))}."
    escaping = [name for name in description.files if name.startswith("/") or ".." in name.split("/")]
    return f"Expected files inside the version. Received: {escaping[0]!r}." if escaping else None


def list_artifacts(models_uri: str) -> list[Artifact]:
    """All whole versions below the location, by name and version; folders without artifact.json are left out."""
    found: list[tuple[str, int]] = []
    for key in open_store(models_uri).keys():
        match = re.fullmatch(rf"([^/@]+)/([1-9][0-9]*)/{re.escape(DESCRIPTION)}", key)
        if match:
            found.append((match[1], int(match[2])))
    return [load_artifact(models_uri, f"{name}@{version}") for name, version in sorted(found)]


def list_versions(models_uri: str, name: str) -> frozenset[int]:
    """The whole versions of one model, without reading them."""
    keys = open_store(f"{models_uri.rstrip('/')}/{name}").keys()
    matches = (re.fullmatch(rf"([1-9][0-9]*)/{re.escape(DESCRIPTION)}", key) for key in keys)
    return frozenset(int(match[1]) for match in matches if match)


def fetch_files(artifact: Artifact, names: tuple[str, ...]) -> Path:
    """A local folder that holds the named files of the version, each checked against its digest.

    A local version is used where it lies. Files from S3 are kept in the user's cache folder under the artifact's
    digest, so a node downloads a version once; the rename at the end makes a half download invisible.

    Raises:
        ArtifactError: a file is missing or not what artifact.json says.
    """
    store = open_store(artifact.uri)
    if not store.uri.startswith("s3://"):
        for name in names:
            _check_file(artifact, name, Path(store.uri) / name)
        return Path(store.uri)
    folder = cache_folder() / "artifacts" / artifact.digest
    for name in names:
        target = folder / name
        if not target.exists():
            _download(store, name, target)
        _check_file(artifact, name, target)
    return folder


def _download(store: Store, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as temporary:
        partial = Path(temporary) / "file"
        try:
            store.get_to_file(name, partial)
        except NotFoundError:
            return  # _check_file says so in one sentence
        partial.replace(target)


def _check_file(artifact: Artifact, name: str, path: Path) -> None:
    record = artifact.description.files.get(name)
    received = None
    if record is None:
        received = f"no digest of {name} in {DESCRIPTION}"
    elif not path.is_file():
        received = f"no file {name}"
    elif sha256_of(path) != record.sha256:
        received = f"other bytes in {name}"
        if path.is_relative_to(cache_folder()):
            path.unlink()  # a damaged cache entry heals at the next try
    if received is not None:
        raise ArtifactError(
            f"Expected {artifact.reference} as published in {artifact.uri}. Received: {received}. "
            "Next: restore the file or publish a new version."
        )


def verify_artifact(artifact: Artifact) -> int:
    """The number of files of the version, each of which was read and has the digest that artifact.json names.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    fetch_files(artifact, tuple(artifact.description.files))
    return len(artifact.description.files)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def claim_version(models_uri: str, name: str) -> int:
    """The next version number of the model, now ours: two writers never get the same one.

    The claim is a put-if-absent of `<name>/_claims/<version>`, outside the version's folder so that a TensorFlow
    Serving that watches the model sees only versions that are being filled. A dead writer leaves a gap in the numbers.
    """
    store = open_store(f"{models_uri.rstrip('/')}/{name}")
    taken = [int(m[1]) for key in store.keys() if (m := re.match(r"(?:_claims/)?([1-9][0-9]*)(?:/|$)", key))]
    version = max(taken, default=0) + 1
    while not store.put_if_absent(f"_claims/{version}", b""):
        version += 1
    return version


def publish_folder(folder: Path, models_uri: str, description: ArtifactDescription) -> Artifact:
    """The published version: every file of the folder is copied to its place, artifact.json last.

    `saved_model.pb` is copied after everything it refers to, for a TensorFlow Serving that polls the folder.
    """
    store = open_store(f"{models_uri.rstrip('/')}/{description.name}/{description.version}")
    for name in sorted(description.files, key=lambda n: (n == "saved_model.pb", n)):
        store.put_file(name, folder / name)
    raw = description.model_dump_json(indent=2).encode()
    if not store.put_if_absent(DESCRIPTION, raw):
        raise ArtifactError(
            f"Expected a free version. Received: {description.name}@{description.version} exists in {models_uri}. "
            "Next: publish again; it takes the next number."
        )
    return Artifact(uri=store.uri, digest=hashlib.sha256(raw).hexdigest(), description=description)


def read_aliases(models_uri: str, name: str) -> dict[str, int]:
    """alias -> version of the model; empty where it has none."""
    return _read_aliases(models_uri, name)[0]


ANY = -1
"""Whatever an alias means now."""


def set_alias(models_uri: str, name: str, alias: str, version: int, *, expected: int | None = ANY) -> bool:
    """Whether the alias means the version now; a concurrent change of another alias is kept (compare-and-swap).

    False, and nothing changed, where the alias does not mean `expected` (None: no version) any more.

    Raises:
        ArtifactError: the version does not exist.
    """
    load_artifact(models_uri, f"{name}@{version}")
    split_reference(f"{name}@{alias}")
    store = open_store(f"{models_uri.rstrip('/')}/{name}")
    while True:
        aliases, token = _read_aliases(models_uri, name)
        if expected != ANY and aliases.get(alias) != expected:
            return False
        raw = json.dumps({**aliases, alias: version}, indent=2, sort_keys=True).encode()
        if token is None:
            done = store.put_if_absent("aliases.json", raw)
        else:
            done = store.put_if_match("aliases.json", raw, token) is not None
        if done:
            return True


def _read_aliases(models_uri: str, name: str) -> tuple[dict[str, int], str | None]:
    store = open_store(f"{models_uri.rstrip('/')}/{name}")
    try:
        raw, token = store.get_versioned("aliases.json")
        return {str(alias): int(version) for alias, version in json.loads(raw).items()}, token
    except NotFoundError:
        return {}, None
    except (ValueError, TypeError, AttributeError):
        raise ArtifactError(
            f"Expected alias: version pairs in {store.uri_of('aliases.json')}. Received: something else. "
            "Next: correct the file."
        ) from None
