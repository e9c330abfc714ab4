"""What the processes of the service say to each other: as large as the limits allow, in every way to start it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import serve_app
from serve_app.settings import ENVIRONMENT, MESSAGE_LENGTH_VARIABLE

from .large_messages import LIMITS, check_large_messages
from .ray_service import start_service
from .small_service import SmallService

FOLDER = Path(serve_app.__file__).parent
PORT = 18840


def of_dockerfile() -> dict[str, str]:
    return dict(re.findall(r"(RAY_SERVE_\w+)=(\S+)", (FOLDER / "Dockerfile").read_text()))


def of_kuberay() -> list[dict[str, str]]:
    """Of each container."""
    service = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    groups = [service["headGroupSpec"], *service["workerGroupSpecs"]]
    containers = [one for group in groups for one in group["template"]["spec"]["containers"]]
    return [{one["name"]: one["value"] for one in each["env"] if "value" in one} for each in containers]


def test_the_shipped_files_set_what_the_command_sets() -> None:
    assert of_dockerfile() == ENVIRONMENT
    found = of_kuberay()
    assert len(found) == 2
    assert all(one == ENVIRONMENT for one in found)


@pytest.mark.slow
def test_large_images_and_answers(tmp_path: Path) -> None:
    """With the variables of the command, the image of containers, and KubeRay's pods, which are the same."""
    small = SmallService(tmp_path)
    with start_service(PORT) as service:
        service.deploy(small.settings(limits=LIMITS, batching={"max_rows": 64}))
        check_large_messages(service.url)


@pytest.mark.slow
def test_an_environment_that_would_refuse_large_messages_is_refused(tmp_path: Path) -> None:
    settings = SmallService(tmp_path).settings()
    with (
        start_service(PORT, **{MESSAGE_LENGTH_VARIABLE: "4194304"}) as service,
        pytest.raises(AssertionError, match=MESSAGE_LENGTH_VARIABLE),
    ):
        service.deploy(settings)
