"""The checkpoints of a run as folders, and the state that each holds: read without torch.

What lies in them, and how they are written: `sam3lora.training.checkpoints`.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.training.saved_run import SavedRun, flat_settings

ADAPTER, OPTIMIZER, STATE = FILES = "adapter.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step_[0-9]{8,}")


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first; folders of other names, such as copies, do not count."""
    if not root.is_dir():
        return []
    found = [path for path in root.glob("step_*") if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def read_state(folder: Path) -> SavedRun:
    """Position, settings and data of the run.

    Raises:
        UserError: The checkpoint is damaged.
    """
    try:
        saved = TypeAdapter(SavedRun).validate_json((folder / STATE).read_bytes())
        flat_settings(Config, saved.settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(folder, f"{STATE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error
    return saved


def damaged(folder: Path, error: object) -> UserError:
    return UserError(f"checkpoint {folder} is damaged ({error}): remove it to resume from the one before")
