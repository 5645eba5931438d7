"""An evaluation as a Ray job: `ray job submit --working-dir . -- python jobs/evaluate.py --config FILE.yaml`.

The flags are those of `cnn-ray evaluate`; so are the exit codes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the working directory of the job

from cnn_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
