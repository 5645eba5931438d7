"""Where the time of a run goes, by py-spy: a table by stage and module.

    python tests/bench/profiles.py floor|local|ray [--images DIR ...] [--count 1024] [--native] [--raw FILE]

floor and local from start to end, Ray's stage workers and their decoders for 8 s while all of them work.

Every Python process of the run is sampled, 100 times a second, without threads that wait: decoder children, Ray's
workers and the driver each under their own name. `--native` also sees C and C++ frames (slower; Linux x86). `--raw`
keeps the collapsed stacks, for https://www.speedscope.app or any flame graph program.

OpenVINO's own threads are not Python's and not seen: the share of predict is too low. `throughput.py --only floor` has
the true split of the CPU time.
"""

from __future__ import annotations

import argparse
import collections
import linecache
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from first_part import make_material
from processes import below
from throughput import TIMEOUT_S, own_command, score_command

RATE = 100
ATTACH_S = 8
SETTLE_S = 2.0
TOP = 12
PACKAGE = Path(__file__).resolve().parents[2] / "cnn_ray"
_PROCESS = re.compile(r'^process \d+:"?(.*?)"?$')
_ROLES = (
    ("cnn_ray.decoders", "decoder"),
    ("_ReadStage", "ray read"),
    ("_PredictStage", "ray predict"),
    ("_CommitStage", "ray commit"),
)
_STAGES = (
    ("predict", "_PredictStage", "openvino_0", "predict_in_batches", "infer (cnn_ray/predictor"),
    ("decode", "decode (cnn_ray/images", "_child_main", "_decode ("),
    ("fetch", "_read_image", "fetch_decode", "_ReadStage", "_Decoder.__call__"),
    ("commit", "commit_shard", "_CommitStage", "_commit_timed"),
    ("imports", "_find_and_load", "<frozen importlib"),
)
_WAITS = ("wait (threading.py", "_worker (concurrent", "result (concurrent", "_read (cnn_ray/dec")
"""Where a stack ends that py-spy saw awake although it only waits, or is about to."""


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
        raw = arguments.raw or Path(folder) / "stacks.txt"
        if arguments.contestant == "ray":
            _attach(score_command(material, Path(folder) / "out", "ray"), raw, arguments.native)
        elif arguments.contestant == "local":
            _record(score_command(material, Path(folder) / "out", "local"), raw, arguments.native)
        else:
            _record(own_command("floor", material), raw, arguments.native)
        print("\n".join(tables(raw.read_text(encoding="utf-8"))))


def _py_spy(output: Path, native: bool) -> list[str]:
    spy = [str(Path(sys.executable).with_name("py-spy")), "record", "--format", "raw", "--rate", str(RATE)]
    return [*spy, "--output", str(output), *(["--native"] if native else [])]


def _record(command: list[str], raw: Path, native: bool) -> None:
    """The stacks of the command and its children, from start to end."""
    spy = [*_py_spy(raw, native), "--subprocesses", "--", *command]
    done = subprocess.run(spy, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0 or not raw.exists():
        raise SystemExit(f"py-spy gave {done.returncode}: {done.stderr[-1500:]}")


def _attach(command: list[str], raw: Path, native: bool) -> None:
    """The stacks of Ray's stage workers and their decoders for ATTACH_S, once all stages work: py-spy that starts Ray
    itself never ends."""
    spies: list[tuple[subprocess.Popen[bytes], Path]] = []
    run_ = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        workers = _stage_workers(run_)
        for pid, name in workers.items():
            path = raw.with_name(f"{raw.name}.{pid}")
            spy = [*_py_spy(path, native), "--duration", str(ATTACH_S), "--pid", str(pid)]
            spies.append((subprocess.Popen(spy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), path))
            path.with_suffix(f"{path.suffix}.name").write_text(name)
        for spy, _ in spies:
            spy.wait(TIMEOUT_S)
        run_.wait(TIMEOUT_S)
    finally:
        run_.kill()
        run_.wait()
    with raw.open("w", encoding="utf-8") as whole:
        for _, path in spies:
            name = path.with_suffix(f"{path.suffix}.name").read_text()
            for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
                whole.write(f'process 0:"{name}";{line}\n')


def _stage_workers(run_: subprocess.Popen[bytes]) -> dict[int, str]:
    """pid -> name of the workers below the run that do one of the three stages, and of the decoders below them."""
    deadline = time.monotonic() + TIMEOUT_S
    while run_.poll() is None and time.monotonic() < deadline:
        names = {pid: _title(pid) for pid in below(run_.pid)}
        found = {pid: name for pid, name in names.items() if name.startswith("ray::") and "Stage" in name}
        found |= {pid: "cnn_ray.decoders" for pid, name in names.items() if "cnn_ray.decoders" in name}
        if any("Predict" in name for name in found.values()) and any("decoders" in name for name in found.values()):
            time.sleep(SETTLE_S)
            return found
        time.sleep(0.2)
    raise SystemExit("Expected workers of all stages. Received: none before the run ended. Raise --count.")


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


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
    if _waits(stack.rpartition(";")[2]):
        return "waiting"
    return next((stage for stage, *signs in _STAGES if any(sign in stack for sign in signs)), "other")


def _waits(frame: str) -> bool:
    if any(sign in frame for sign in _WAITS):
        return True
    _, _, where = frame.partition(" (cnn_ray/")
    file, _, line = where.rstrip(")").rpartition(":")
    return bool(where) and "os.read(" in linecache.getline(str(PACKAGE / file), int(line))


def _place(frame: str) -> str:
    """ "function (file)" without the line."""
    name, _, where = frame.partition(" (")
    file = where.rpartition(":")[0] or where.rstrip(")")
    return f"{name} ({'/'.join(Path(file).parts[-2:])})"


if __name__ == "__main__":
    main()
