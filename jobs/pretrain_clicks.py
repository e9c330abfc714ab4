"""Train the click head of the built-in tiny SAM 3 on its frozen trunk (about two hours on one core).

    python jobs/pretrain_clicks.py --output-dir outputs/tiny_clicks
    python jobs/pretrain_clicks.py --output-dir outputs/smoke --smoke      a few steps, to see that it runs

Draws and encodes scenes, trains, measures on held-out scenes, and writes OUTPUT_DIR/tiny (the folder to copy to
sam3lora/model/assets/tiny: the detector as it is, and the new click head) and OUTPUT_DIR/clicks.json. A run that was
cut goes on when started again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

# A script finds only the modules beside it; `jobs` and `sam3lora` are one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder of scenes, snapshots and the result.")],
    threads: Annotated[int, typer.Option(help="Threads of the arithmetic.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Steps (default: the recipe's).")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps on a few scenes.")] = False,
) -> None:
    # The processes that draw scenes import this file again: nothing heavy is imported above.
    import torch

    from jobs.bench.scripts import make_output_folder
    from jobs.pretrain.click_run import ClickRunSettings, pretrain_clicks
    from jobs.pretrain.click_stage import ClickStage

    folder = make_output_folder(output_dir, "--output-dir")
    torch.set_num_threads(threads)
    settings = ClickRunSettings(stage=ClickStage(**({} if steps is None else {"steps": steps})))
    if smoke:
        settings = ClickRunSettings(16, 16, 2, ClickStage(steps=4, mask_steps=2, last_steps=2))
    report = pretrain_clicks(folder, settings, log=lambda line: print(line, flush=True))
    print(report)


if __name__ == "__main__":
    from jobs.bench.scripts import run_script

    sys.exit(run_script(main))
