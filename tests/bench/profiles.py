"""Where the time of a run goes, by py-spy: a table by stage and module.

    python tests/bench/profiles.py floor|local|ray [--images DIR ...] [--count 1024] [--native] [--raw FILE]

Every Python process of the run is sampled, 100 times a second, without threads that wait: decoder children, Ray's
workers and the driver each under their own name. `--native` also sees C and C++ frames (slower; Linux x86). `--raw`
keeps the collapsed stacks, for https://www.speedscope.app or any flame graph program.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from first_part import make_material
from throughput import TIMEOUT_S, own_command, score_command

RATE = 100
TOP = 12
_PROCESS = re.compile(r'^process \d+:"?(.*?)"?$')
_ROLES = (("cnn_ray.decoders", "decoder"), ("ray::", "ray worker"), ("gcs_server", "ray"), ("raylet", "ray"))
_STAGES = (
    ("predict", "_PredictStage", "openvino_0", "predict_in_batches", "infer (cnn_ray/predictor"),
    ("decode", "decode (cnn_ray/images", "_child_main", "_decode ("),
    ("fetch", "_read_image", "fetch_decode", "_ReadStage"),
    ("commit", "commit_shard", "_CommitStage", "_commit_timed"),
    ("imports", "_find_and_load", "<frozen importlib"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=("floor", "local", "ray"))
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="folders; default: drawn pages")
    parser.add_argument("--count", type=int, default=1024, help="images of the run (default 1024)")
    parser.add_argument("--native", action="store_true", help="C and C++ frames too")
    parser.add_argument("--raw", type=Path, help="keep the collapsed stacks here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cnn_ray-profile-") as folder:
        material = make_material(arguments.images, Path(folder), arguments.count)
        if arguments.contestant == "floor":
            command = own_command("floor", material)
        else:
            command = score_command(material, Path(folder) / "out", arguments.contestant)
        raw = arguments.raw or Path(folder) / "stacks.txt"
        _record(command, raw, arguments.native)
        print("\n".join(tables(raw.read_text(encoding="utf-8"))))


def _record(command: list[str], raw: Path, native: bool) -> None:
    py_spy = str(Path(sys.executable).with_name("py-spy"))
    spy = [py_spy, "record", "--format", "raw", "--rate", str(RATE), "--subprocesses", "--output", str(raw)]
    done = subprocess.run(
        [*spy, *(["--native"] if native else []), "--", *command], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode != 0 or not raw.exists():
        raise SystemExit(f"py-spy gave {done.returncode}: {done.stderr[-1500:]}")


def tables(stacks: str) -> list[str]:
    """Lines: the share of each process and stage, then of the modules at the top of the stack, in % of all samples."""
    stages: collections.Counter[tuple[str, str]] = collections.Counter()
    modules: collections.Counter[tuple[str, str]] = collections.Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        role = _role(frames)
        stages[role, _stage(stack)] += int(count)
        modules[role, _place(frames[-1])] += int(count)
    total = sum(stages.values()) or 1
    lines = [f"{total} samples = {total / RATE:.1f} busy thread seconds", "", "process      stage"]
    lines += [f"{100 * n / total:5.1f} %  {role:11} {stage}" for (role, stage), n in stages.most_common(TOP)]
    lines += ["", "process      where the samples end"]
    lines += [f"{100 * n / total:5.1f} %  {role:11} {place}" for (role, place), n in modules.most_common(TOP)]
    return lines


def _role(frames: list[str]) -> str:
    """Whose process: the last that the stack names."""
    names = [match[1] for frame in frames if (match := _PROCESS.match(frame))]
    if not names:
        return "main"
    return next((role for part, role in _ROLES if part in names[-1]), "main")


def _stage(stack: str) -> str:
    return next((stage for stage, *signs in _STAGES if any(sign in stack for sign in signs)), "other")


def _place(frame: str) -> str:
    """ "function (file)" without the line."""
    name, _, where = frame.partition(" (")
    file = where.rpartition(":")[0] or where.rstrip(")")
    return f"{name} ({'/'.join(Path(file).parts[-2:])})"


if __name__ == "__main__":
    main()
