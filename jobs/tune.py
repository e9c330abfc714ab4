"""Run a sweep on a Ray cluster, as a submitted job.

    ray job submit --working-dir . -- python jobs/tune.py SPACE a.b=c --data-dir /shared/data --output-dir /shared/sweep

SPACE, overrides and options are those of `sam3lora tune`; see `sam3lora tune --help`. A job runs in a temporary copy of
the working directory, so data and output need absolute paths on storage that every host sees. Submitted again with
--resume, it keeps finished trials and continues others from their checkpoints.
The exit status is 0 on success, 2 on a mistake in the settings, 1 on any other failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The working directory of a job holds the source, but Python looks only beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam3lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
