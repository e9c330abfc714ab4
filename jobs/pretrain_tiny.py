"""Train the built-in tiny SAM 3 from random weights (two to three hours on one core, less on more).

    python jobs/pretrain_tiny.py --output-dir outputs/tiny --threads 2
    python jobs/pretrain_tiny.py --output-dir outputs/smoke --smoke      a few steps, to see that it runs

Draws the scenes, trains in two stages, measures on held-out scenes, and writes OUTPUT_DIR/tiny (the folder to copy to
sam3lora/model/assets/tiny) and OUTPUT_DIR/report.json. A run that was cut goes on when started again.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

# A script finds only the modules beside it; `jobs` and `sam3lora` are one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SMOKE = {"dense_scenes": 32, "scenes": 32, "held_out_scenes": 4, "vision_steps": 3, "joint_steps": 3, "joint_images": 2}


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder of scenes, snapshots and the result.")],
    threads: Annotated[int, typer.Option(help="Threads of the arithmetic.")] = 2,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps on a few scenes.")] = False,
) -> None:
    # The processes that draw scenes import this file again: nothing heavy is imported above.
    import torch

    from jobs.bench.scripts import make_output_folder
    from jobs.pretrain.run import PretrainSettings, pretrain

    folder = make_output_folder(output_dir, "--output-dir")
    torch.set_num_threads(threads)
    settings = PretrainSettings(**(SMOKE if smoke else {}))
    report = pretrain(folder, settings, lambda line: print(line, flush=True))
    for name, value in asdict(report).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    from jobs.bench.scripts import run_script

    sys.exit(run_script(main))
