"""Measure adapters or a base model on a Ray cluster, as a submitted job.

    ray job submit --working-dir . -- python jobs/validate.py --weights /shared/run/best --val-data-dir /shared/data \
        --output /shared/validation --num-workers 4

Options are those of `sam3lora validate`; see `sam3lora validate --help`. A job runs in a temporary copy of the working
directory, so data, adapters and output need absolute paths on storage that every host sees.
The exit status is 0 on success, 2 on a mistake in the options, 1 on any other failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The working directory of a job holds the source, but Python looks only beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam3lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
