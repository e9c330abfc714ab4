"""`sam3lora serve`: the HTTP application on a local Ray, or on a cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam3lora.cli.service import LOCAL_HOSTS, run_service
from sam3lora.errors import UserError
from sam3lora.local_paths import absolute_base
from sam3lora.start_marks import mark

if TYPE_CHECKING:
    from serve_app.settings import ServeSettings


def serve(
    adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of adapter folders; without it and --model: two samples."),
    ] = None,
    model: Annotated[str | None, typer.Option(help='Base model: "tiny", a hub id or a folder (default: tiny).')] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP port.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Settings, as under `args` in serve_app/config.yaml.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the model's input in pixels.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Copies of the model (default: 1).")] = None,
    gpus: Annotated[
        float | None, typer.Option("--num-gpus", min=0, help="GPUs of each copy (default: 1 if there are any).")
    ] = None,
    haproxy: Annotated[bool, typer.Option("--haproxy", help="HAProxy in front: faster, see docs/serving.md.")] = False,
    address: Annotated[str | None, typer.Option(help="Address of a Ray cluster (default: a local Ray).")] = None,
) -> None:
    """Serve segmentation over HTTP: many adapters over one base model.

    Example:  sam3lora serve --adapters outputs/adapters --port 8000
    """
    settings = _settings(config, adapters, model, resolution, replicas, gpus)
    mark("settings")
    _check_port(host, port)
    from serve_app.http.auth import keys_from_environment
    from serve_app.settings import prepare_environment

    # One HTTP process can listen itself; several need one in front that shares requests out.
    haproxy = haproxy or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    is_local = (address or os.environ.get("RAY_ADDRESS") or "local") == "local"
    alone = is_local and settings.ingress_replicas == 1 and not haproxy
    is_direct = prepare_environment(haproxy=haproxy, direct_port=port if alone else None)
    has_keys = bool(keys_from_environment(settings.api_keys_variable))
    if host not in LOCAL_HOSTS and not has_keys:
        _warn(
            f"listening on {host} without an API key: anyone who can reach this machine can use the service. "
            f"Set {settings.api_keys_variable}=KEY to require one"
        )
    if host in LOCAL_HOSTS and not has_keys and settings.allowed_hosts is None:
        # A page on the web could have its own name lead here, and call the service from this machine's browser.
        settings = settings.model_copy(update={"allowed_hosts": LOCAL_HOSTS})
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        _warn("RAY_AUTH_MODE=disabled: anyone who can reach Ray's ports on this machine can run programs. Unset it")
    _run(settings, host, port, address, is_direct)


def _run(settings: ServeSettings, host: str, port: int, address: str | None, is_direct: bool) -> None:
    def announce() -> None:
        _print_addresses(settings, host, port)

    run_service(settings, host, port, address, is_direct=is_direct, announce=announce)


def _settings(
    config: Path | None,
    adapters: Path | None,
    model: str | None,
    resolution: int | None,
    replicas: int | None,
    gpus: float | None,
) -> ServeSettings:
    import yaml
    from pydantic import ValidationError

    import serve_app
    from serve_app.settings import ServeSettings

    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8")) or {} if config else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --config {config}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {config} must hold settings as `key: value`, got {type(values).__name__}")
    if "applications" in values:
        values = _application(values, config)
    options = {
        "model": model and absolute_base(model),
        "resolution": resolution,
        "replicas": replicas,
        "num_gpus": gpus,
    }
    values |= {name: value for name, value in options.items() if value is not None}
    if adapters is not None:
        if not adapters.is_dir():
            raise UserError(f"--adapters {adapters} is no folder: expected one that holds adapter folders")
        given = values.get("adapters") or {}
        if not isinstance(given, dict):
            raise UserError(f"--config {config}: adapters must be settings as `key: value`, got {given!r}")
        values["adapters"] = {**given, "root": str(adapters.absolute())}
    elif config is None and model is None:
        values["adapters"] = {"root": str(Path(serve_app.__file__).parent / "samples")}
    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"the settings of the service are wrong: {found}") from None


def _application(values: dict[str, Any], config: Path | None) -> dict[str, Any]:
    """The settings within a file for `serve run`."""
    try:
        application = values["applications"][0]
        deployments = application.get("deployments") or []
        adapters = [one.get("user_config") for one in deployments if one["name"] == "Segmenter"]
        found = dict(application.get("args") or {})
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"--config {config} holds no application as in serve_app/config.yaml") from None
    return {**found, "adapters": adapters[0]} if adapters and adapters[0] else found


def _check_port(host: str, port: int) -> None:
    from serve_app.direct_port import cannot_listen

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise cannot_listen(host, port, error) from None


def _print_addresses(settings: ServeSettings, host: str, port: int) -> None:
    from rich.console import Console

    import serve_app
    from serve_app.settings import ADAPTER_ID_PATTERN

    url = f"http://{'localhost' if host in (*LOCAL_HOSTS, '0.0.0.0', '::') else host}:{port}"
    root = settings.adapters.root
    folders = sorted(file.parent.name for file in root.glob("[!.]*/adapter_config.json")) if root else []
    names = [name for name in folders if re.match(ADAPTER_ID_PATTERN, name)]
    misnamed = [name for name in folders if name not in names]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    samples = Path(serve_app.__file__).parent
    image = samples / "static" / "sample.jpg" if root == samples / "samples" else "photo.jpg"
    known = [(name, prompt) for name in names[:50] if root and (prompt := _first_prompt(root / name))]
    request = {"prompts": [known[0][1]], "adapter": known[0][0]} if known else {"prompts": ["gear"]}
    Console(markup=False, soft_wrap=True, highlight=False).print(
        f"{settings.model} with {shown or 'no adapters'}\n"
        f"{_not_served(misnamed)}"
        f"page      {url}/\n"
        f"API       {url}/docs\n"
        f"try       curl -F image=@{image} -F {shlex.quote(f'request={json.dumps(request)}')} {url}/v1/segment\n"
        "Ctrl-C stops it"
    )


def _not_served(misnamed: list[str]) -> str:
    """A line for folders of adapters that nobody can ask for by their name; nothing if there are none."""
    if not misnamed:
        return ""
    from serve_app.settings import ADAPTER_ID_RULE

    shown = ", ".join(map(repr, misnamed[:8])) + (", ..." if len(misnamed) > 8 else "")
    return f"not served: {shown}: rename the folder, {ADAPTER_ID_RULE}\n"


def _first_prompt(folder: Path) -> str | None:
    """Of those that the adapter was trained on, if its metadata can be read."""
    try:
        prompt = json.loads((folder / "sam3lora.json").read_text(encoding="utf-8"))["prompts"][0]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return prompt if isinstance(prompt, str) and prompt.isprintable() and len(prompt) < 60 else None


def _warn(message: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(f"[bold yellow]warning:[/] {message}")
