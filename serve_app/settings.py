"""Settings of the service: the `args` of `serve_app/config.yaml`, and the environment variables of Ray Serve.

The variables must be set before Ray starts, on every node: eval "$(python -m serve_app.settings)".
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sam3lora.local_paths import path_problem

ADAPTER_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
ADAPTER_ID_RULE = (
    "an adapter id has up to 100 letters, digits, dots, hyphens and underscores and begins with a letter or a digit"
)
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Settings):
    """Limits of one request: size, content, time, and the number that may wait."""

    max_body_bytes: int = Field(default=32 * 2**20, gt=0, le=2**30, description="Largest request body.")
    max_megapixels: float = Field(
        default=50.0, gt=0, description="Largest image; checked in its header before it is decoded."
    )
    image_formats: tuple[str, ...] = Field(default=IMAGE_FORMATS, description="Accepted formats, by content.")
    max_prompts: int = Field(default=32, gt=0)
    max_prompt_chars: int = Field(default=200, gt=0)
    max_boxes: int = Field(default=32, gt=0)
    max_objects: int = Field(default=32, gt=0, description="Objects of a request that refines.")
    max_clicks: int = Field(default=64, gt=0, description="Clicks on one object.")
    max_detections: int = Field(
        default=200,
        gt=0,
        description="Most detections of a prompt; also limits the adapters' own values.",
    )
    max_answer_bytes: int = Field(
        default=256 * 2**20, gt=0, le=2**30, description="Largest response; many detailed masks of a large image."
    )
    timeout_s: float = Field(default=30.0, gt=0, description="From the request's arrival to its response.")
    max_queued: int = Field(
        default=64,
        gt=0,
        description="Requests that may wait on a replica; one more is refused at once with Retry-After.",
    )
    max_in_flight: int = Field(
        default=256,
        gt=0,
        description="Requests that an ingress replica works on; one more is refused. Also the bodies that arrive at a "
        "time; beyond it the slowest is ended.",
    )
    overload_status: Literal[503, 429] = 503


class Batching(_Settings):
    """Limits of one forward pass."""

    max_rows: int = Field(default=16, gt=0, description="(image, prompt) pairs.")
    max_images: int = Field(default=8, gt=0, description="Images that pass the vision tower together.")
    encode_ahead: bool | None = Field(
        default=None,
        description="Encode images of waiting requests in a second thread while a batch runs, on a CPU; yes, if torch "
        "has one thread and there are more cores than replicas.",
    )


class Caches(_Settings):
    """Cache sizes of a replica."""

    images_mb: int = Field(default=1024, gt=0, description="Image features; the least recently used are evicted first.")
    prompts: int = Field(default=4096, gt=0, description="Text features.")


class Autoscaling(_Settings):
    """Number of replicas by load."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, gt=0)
    target_ongoing_requests: float = Field(default=16.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class AdapterSettings(_Settings):
    """Settings that may change while the service runs: the `user_config` of the deployment `Segmenter`.

    A new folder in the root is served without any change here.
    """

    root: Path | None = Field(
        default=None, description="Folder of adapter folders; the name of a folder is the adapter's id."
    )
    allowed: tuple[str, ...] | None = Field(default=None, description="Serve only these; all of the root if not given.")
    preload: tuple[str, ...] = Field(default=(), description="Loaded before the replica is ready.")

    @field_validator("root")
    @classmethod
    def _refuse_address(cls, root: Path | None) -> Path | None:
        if root is not None and (problem := path_problem(root)):
            raise ValueError(problem)
        return root


class ServeSettings(_Settings):
    """The whole service."""

    model: str = Field(default="tiny", description='"tiny", a hub id or a folder.')
    revision: str | None = None
    resolution: int | None = Field(default=None, gt=0)
    local_files_only: bool = False
    precision: Literal["float32", "bfloat16"] | None = Field(default=None, description="bfloat16 on a GPU that has it.")
    compile_vision: bool = Field(
        default=False, description="torch.compile of the vision encoder: slower start, faster images."
    )
    cuda_graphs: bool | None = Field(
        default=None,
        description="Capture the model's stages as CUDA graphs on a GPU; yes, unless SAM3LORA_CUDA_GRAPHS is 0.",
    )
    clicks: bool | None = Field(
        default=None,
        description="Answer POST /v1/refine, which keeps more of each image; yes, if the base model has a click head.",
    )
    adapters: AdapterSettings = AdapterSettings()
    max_resident_adapters: int = Field(default=16, gt=0, description="Adapters in a replica's memory.")
    max_adapter_rank: int = Field(default=256, gt=0)
    replicas: int = Field(default=1, gt=0, description="Model replicas; ignored with autoscaling.")
    autoscaling: Autoscaling | None = None
    num_gpus: float | None = Field(
        default=None, ge=0, description="GPUs of each replica; 1 if the cluster has GPUs, else 0."
    )
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs of each replica.")
    torch_threads: int | None = Field(default=None, gt=0, description="Of each replica; torch decides if not given.")
    ingress_replicas: int = Field(default=1, gt=0)
    api_keys_variable: str = Field(
        default="SAM3LORA_API_KEYS", description="Environment variable with the API keys, separated by commas."
    )
    allowed_hosts: tuple[str, ...] | None = Field(
        default=None, description="Names under which the service may be called (header Host); any if not given."
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description='Other sites whose pages may call the service: "https://example.org"; "*" for all.'
    )
    batching: Batching = Batching()
    caches: Caches = Caches()
    limits: Limits = Limits()

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        """As browsers send them: another spelling would match no site, without a word."""
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"expected sites such as https://example.org, without a path, or *; got {origin!r}")
        return origins

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas

    @property
    def first_replicas(self) -> int:
        return self.autoscaling.min_replicas if self.autoscaling else self.replicas

    @property
    def most_in_flight(self) -> int:
        """Requests that all replicas together can queue, and some in transit: the ingress reads no more bodies."""
        return self.most_replicas * (self.limits.max_queued + 2 * self.batching.max_rows)


MESSAGE_LENGTH_VARIABLE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"

ENVIRONMENT = {
    # These halve the cost of a call to a replica: our code never blocks the loop that it shares with Serve.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # gRPC's own limit; 4 MiB by default. `Limits` bounds what is sent.
    MESSAGE_LENGTH_VARIABLE: str(2**31 - 1),
    # Ray's own answers in the service's form, and limits of headers.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.http.front.middlewares",
    # A dead HTTP process is replaced in seconds; 10 s by default.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""What the service expects of Ray Serve; also in `Dockerfile` and `rayservice.yaml`."""

HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # 30 by default, which makes a stop take a minute
}
"""HAProxy in front instead of Serve's own Python proxy."""


DIRECT = {
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_PORT_QUARANTINE_S": "0",  # a new HTTP process takes the port of one that died at once
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
}
"""The application's HTTP process listens itself: no Ray process in front, which would pass every body on."""


def prepare_environment(*, haproxy: bool = False, direct_port: int | None = None) -> bool:
    """Set the variables that are not set; call it before `ray.serve` is imported.

    Args:
        haproxy: Put HAProxy in front.
        direct_port: For the application's only HTTP process to listen on itself; None leaves it behind Ray's.

    Returns:
        Whether it will listen itself: not if the variables that are set say otherwise.
    """
    variables = ENVIRONMENT | (HAPROXY if haproxy else {})
    is_direct = direct_port is not None and os.environ.get("RAY_SERVE_ENABLE_DIRECT_INGRESS", "1") == "1"
    if direct_port is not None and is_direct:
        variables |= DIRECT
        os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] = str(direct_port)
        os.environ["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(direct_port + 1)  # excluded
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    return is_direct


if __name__ == "__main__":
    for _name, _value in ENVIRONMENT.items():
        print(f"export {_name}={_value}")
