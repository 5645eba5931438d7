"""A night with 10 % hostile files: all good rows scored, each bad row coded as expected, memory bounded."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import duckdb
from factories import image_bytes, publish_small_artifact
from hostile import hostile_corpus

MOST_RSS_KIB = 1_000 * 1024
GOOD = 270
RUN = """
import sys
from cnn_ray import score
from cnn_ray.config import ScoreConfig
score.run_score(ScoreConfig(input_uri=sys.argv[1], output_uri=sys.argv[2], models_uri=sys.argv[3], model="small@1",
                            max_quarantine_rate=1.0))
import resource
# not ru_maxrss of the process itself: it begins with what the process that started it had
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_a_night_with_hostile_files(tmp_path: Path) -> None:
    """25 to 30 files of the corpus among 270 good ones; the peaks are those of the run and of its decoders."""
    publish_small_artifact(str(tmp_path / "models"))
    shots = tmp_path / "shots"
    shots.mkdir()
    wanted: dict[str, str | None] = {}
    for seed in range(GOOD):
        name = f"good-{seed:04d}.png"
        (shots / name).write_bytes(image_bytes(seed))
        wanted[name] = None
    corpus = hostile_corpus(5)
    always = {"big-8k.png", "big-bomb.png", "cut-5.jpg", "closed-5.jpg", "odd-ycck.jpg"}
    for name in sorted({*random.Random(5).sample(sorted(corpus), 25), *always}):
        data, code = corpus[name]
        (shots / name).write_bytes(data)
        wanted[name] = code
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(shots), str(out), str(tmp_path / "models")],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = duckdb.read_parquet(f"{out}/**/part-*.parquet").project("uri").fetchall()
    bad = duckdb.read_parquet(f"{out}/**/quarantine-*.parquet").project("uri, code").fetchall()
    got: dict[str, str | None] = {Path(uri).name: None for (uri,) in rows} | {Path(uri).name: c for uri, c in bad}
    assert got == wanted
    assert len(rows) + len(bad) == len(wanted)
    # RUSAGE_CHILDREN is the peak of the largest decoder, which the run has waited for at its end.
    run_kib, decoder_kib = (int(n) for n in run.stdout.split()[-2:])
    print(f"peak RSS: run {run_kib / 1024:.0f} MiB, largest decoder {decoder_kib / 1024:.0f} MiB")
    assert decoder_kib > 10_000
    assert run_kib + 2 * decoder_kib < MOST_RSS_KIB
