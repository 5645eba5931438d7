"""Starts `cnn-ray` commands as forks of a process that has imported everything, so that a start costs 20 ms, not 2 s.

Usage: warm_parent.py local|ray. One JSON line in, {"args": [...], "log": "file"}; two out: {"pid": N} and, when it has
ended, {"code": N}. No thread runs in this process when it forks (checked), so the child is what a fresh start would be.
"""

import json
import os
import sys
import traceback
from pathlib import Path


def import_all(runner: str) -> None:
    import boto3  # noqa: F401
    import obstore.store  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import rich.progress  # noqa: F401

    from cnn_ray import cli, console, runners, score  # noqa: F401
    from cnn_ray.predictor import import_openvino

    import_openvino()
    if runner == "ray":
        import ray.data
        import ray.util.metrics  # noqa: F401


def child(order: dict) -> None:
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source, target)
        from cnn_ray import cli

        cli.main(order["args"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 it goes to the log, the code tells
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_all(sys.argv[1])
    for line in sys.stdin:
        threads = len(list(Path("/proc/self/task").iterdir()))
        if threads != 1:
            sys.exit(f"Expected one thread before a fork. Received: {threads}.")
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        answers.write(json.dumps({"pid": pid}) + "\n")
        answers.flush()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answers.write(json.dumps({"code": code}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
