# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
"""What a committed shard and a finished generation say of themselves: the contents of part records and manifests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from cnn_ray.tallies import BadRow, Tally, TopRow

FORMAT = 3
"""3: parts hold sha256, phash, model_name, model_version and run_date."""


class FileRef(BaseModel):
    """One committed file: its name, rows and digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    rows: int
    size_bytes: int
    sha256: str

    @property
    def generation(self) -> int:
        """The generation that wrote it, as its name says."""
        return int(self.name.partition("-g")[2][:4])


class PartRecord(BaseModel):
    """What one committed shard holds, and how it was made: `wait_s` and `busy_s` are seconds that the predictor waited
    for its images and worked on them, None where the part was read back. No committed byte depends on the two."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    part: FileRef
    quarantine: FileRef | None
    tally: Tally
    wait_s: float | None = None
    busy_s: float | None = None

    @property
    def rows(self) -> int:
        """Rows of the plan that this shard accounts for."""
        return self.tally.rows


class GenerationRecord(BaseModel):
    """What one generation did. `superseded` of its rows replace older ones; `images_per_s` and the predictor's seconds
    are those of the attempt that finished it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    generation: int
    planned: int
    scored: int
    quarantined: int
    superseded: int
    removed: int
    retry: bool
    parts: int
    started_at: str
    finished_at: str
    images_per_s: float
    wait_s: float
    busy_s: float


class Manifest(BaseModel):
    """The last word on one generation. Counts and files are those of all live rows, of this and of earlier generations:
    what readers see. `removed` live rows are of objects that the input no longer had; `accepted` quarantined rows were
    taken as they are by somebody, and only what comes on top is judged. `left_out` counts what lay in the input and was
    no image to be scored, by reason (`input_filters.REASONS`), when the generation was planned."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    generation: int
    status: str
    planned: int
    scored: int
    quarantined: int
    flagged: int
    labels: dict[str, int]
    codes: dict[str, int]
    score_bins: tuple[int, ...]
    top: tuple[TopRow, ...]
    bad: tuple[BadRow, ...]
    removed: int
    accepted: int
    left_out: dict[str, int] = {}
    parts: tuple[FileRef, ...]
    quarantine: tuple[FileRef, ...]
    superseded: tuple[FileRef, ...]
    generations: tuple[GenerationRecord, ...]
    model: str
    version: int
    model_digest: str
    label_names: tuple[str, ...]
    positive_label: str | None
    threshold: float
    engine: str
    precision: str
    runner: str
    config: dict[str, Any]
    libraries: dict[str, str]
    started_at: str
    finished_at: str

    @property
    def tally(self) -> Tally:
        """The live totals."""
        return Tally.model_validate(self.model_dump(include=set(Tally.model_fields)))
