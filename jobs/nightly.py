"""The nights as a Ray job: `ray job submit --working-dir . -- python jobs/nightly.py --config jobs/nightly.yaml`.

The flags are those of `cnn-ray nightly`; so are the exit codes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the working directory of the job

from cnn_ray.cli import main

if __name__ == "__main__":
    main(["nightly", *sys.argv[1:]])
