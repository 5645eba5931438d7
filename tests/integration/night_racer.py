"""One host of a race for the same nights: `night_racer.py CONFIG TODAY LOG`. Appends when each of its runs worked on a
date: `begin DATE PID`, `end DATE PID`; ends with nightly's own code."""

import os
import sys
import time
from datetime import date

from cnn_ray import nightly, score
from cnn_ray.config import NightlyConfig, build_config, load_yaml


def main() -> int:
    file, today, log = sys.argv[1:]
    real = score._score_pending

    def watched(job, *rest):
        say(f"begin {job.config.date} {os.getpid()}")
        time.sleep(0.5)
        try:
            return real(job, *rest)
        finally:
            say(f"end {job.config.date} {os.getpid()}")

    def say(line: str) -> None:
        with open(log, "a") as stream:  # noqa: PTH123 - one write of one line is whole
            stream.write(f"{line}\n")

    score._score_pending = watched
    result = nightly.run_nightly(build_config(NightlyConfig, load_yaml(file)), date.fromisoformat(today))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
