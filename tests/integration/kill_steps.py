"""Runs one scoring job in forked children: SIGKILL right after write N, then a rerun, for every N until nothing kills.

Usage: kill_steps.py MODELS INPUT WORK [BASE]. Prints one JSON line per N: the write that was last, and the exit of the
rerun. Each output begins as a copy of BASE, a finished run over an earlier state of INPUT, where one is given.
Forking after the imports makes a round cost half a second; no thread runs in the parent.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from cnn_ray import score
from cnn_ray.config import ScoreConfig
from cnn_ray.predictor import import_openvino
from cnn_ray.storage import LocalStore

WRITES = ("put", "put_if_absent", "put_if_match")


def kill_after(number: int, log: Path) -> None:
    done = 0

    def wrap(write):
        def wrapped(self, key, *rest):
            nonlocal done
            result = write(self, key, *rest)
            done += 1
            if done == number:
                log.write_text(key)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in WRITES:
        setattr(LocalStore, name, wrap(getattr(LocalStore, name)))


def run_in_child(config: ScoreConfig, number: int | None, log: Path) -> int:
    pid = os.fork()
    if pid == 0:
        if number is not None:
            kill_after(number, log)
        try:
            score.run_score(config)
        except BaseException as error:  # noqa: BLE001 the parent asserts on it
            log.write_text(repr(error))
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    models, images, work, *base = sys.argv[1:]
    import_openvino()
    for number in range(100):  # 0: never killed, the undisturbed run
        log = Path(work) / f"log-{number}"
        if base:
            shutil.copytree(base[0], f"{work}/out-{number}")
        config = ScoreConfig(
            model="small@1",
            models_uri=models,
            input_uri=images,
            output_uri=f"{work}/out-{number}",
            shard_size=8,
            num_threads=1,
            max_quarantine_rate=0.1,
            report=False,  # it comes after all that is committed
        )
        first = run_in_child(config, number or None, log)
        again = run_in_child(config, None, log.with_suffix(".again"))
        last = log.read_text() if log.exists() else ""
        sys.stdout.write(json.dumps({"number": number, "first": first, "again": again, "last_write": last}) + "\n")
        if number > 0 and first == 0:
            return


if __name__ == "__main__":
    main()
