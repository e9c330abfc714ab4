"""Upload of adapter folders and merged models to the Hugging Face hub, and the checks before it."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import check_adapter_folder, is_adapter_folder
from sam3lora.model.adapter.folder_files import METADATA_FILE
from sam3lora.model.adapter.metadata import is_dense_folder
from sam3lora.model.base_folder import find_base
from sam3lora.model.dense.folder import check_dense_folder
from sam3lora.model.publish.model_card import CARD_FILE

CARD_HEAD_LINES = 16
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


@dataclass(frozen=True)
class Upload:
    """An upload, or the plan of one: ``files`` maps names to sizes in bytes; ``url`` is None after a dry run."""

    repo_id: str
    private: bool
    files: dict[str, int]
    card_head: str
    url: str | None = None


def is_merged_folder(folder: str | Path) -> bool:
    """Whether the folder holds a merged model: a base model has no metadata file, an adapter no config.json."""
    return all((Path(folder) / file).is_file() for file in ("config.json", METADATA_FILE))


def check_folder(folder: str | Path) -> list[Path]:
    """The files of a complete adapter or merged model, sorted; hidden files and sub-folders are left out.

    Raises:
        UserError: The folder holds neither, a file is missing, empty or damaged, or there is a pickle.
    """
    folder = Path(folder)
    if is_merged_folder(folder):
        find_base(str(folder))
    elif not is_adapter_folder(folder):
        best = folder / "best"
        hint = f": did you mean {best}?" if is_adapter_folder(best) else ", such as `best/` of a run"
        raise UserError(f"{folder} is neither a complete adapter folder nor a merged model; expected one{hint}")
    elif not is_dense_folder(folder):
        check_adapter_folder(folder)
    if is_dense_folder(folder):
        check_dense_folder(folder)
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    for file in files:
        if file.suffix.lower() in _PICKLES:
            raise UserError(f"{file} is a pickle, which runs code where it is loaded: remove it, keep safetensors")
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: write the folder anew")
        if file.suffix == ".safetensors":
            _check_safetensors(file)
    return files


def push_adapter(
    folder: str | Path, repo_id: str, *, private: bool = True, dry_run: bool = False, token: str | None = None
) -> Upload:
    """Upload an adapter or a merged model with its model card; files of the same name on the hub are replaced.

    The repository is created if it does not exist; with ``private``, a public one is refused. ``dry_run`` checks all
    that can be checked without the network, and uploads nothing. ``token`` None takes that of `hf auth login` or
    ``HF_TOKEN``.

    Raises:
        UserError: The folder is refused by :func:`check_folder` or has no model card, ``repo_id`` is malformed, or
            token, network or access are missing.
    """
    folder = Path(folder)
    paths = check_folder(folder)
    if folder / CARD_FILE not in paths:
        raise UserError(f"{folder} has no model card: write {CARD_FILE} with its prompts and how to use it")
    check_repo_id(repo_id)
    files = {file.name: file.stat().st_size for file in paths}
    head = (folder / CARD_FILE).read_text(encoding="utf-8").splitlines()[:CARD_HEAD_LINES]
    url = None if dry_run else _upload(folder, list(files), repo_id, private, token)
    return Upload(repo_id, private, files, "\n".join(head), url)


def _upload(folder: Path, names: list[str], repo_id: str, private: bool, token: str | None) -> str:
    from huggingface_hub import HfApi, constants, errors, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"cannot push to {repo_id}: HF_HUB_OFFLINE is set. Unset it, or try with --dry-run")
    token = token or get_token()
    if token is None:
        raise UserError(f"cannot push to {repo_id} without a token: run `hf auth login` or set HF_TOKEN")
    api = HfApi(token=token)
    try:
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if private and not api.model_info(repo_id).private:
            raise UserError(f"{repo_id} exists and is public: choose another name, or push with --public if it may be")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message="Upload by sam3lora",
        )
    except errors.HfHubHTTPError as error:
        raise UserError(f"the hub refused {repo_id}: has the token write access? {error}") from error
    except (errors.HTTPError, OSError) as error:
        raise UserError(f"could not reach the hub to push to {repo_id}: {error}") from error
    return url


def check_repo_id(repo_id: str) -> None:
    """Raise a UserError unless ``repo_id`` is a name OWNER/NAME that the hub accepts."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no valid hub name: {error}") from error
    if "/" not in repo_id:
        raise UserError(f"expected a hub name OWNER/NAME, got {repo_id!r}")


def _check_safetensors(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass  # the header names the file's length
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file: {error}") from error
