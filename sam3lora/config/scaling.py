"""Settings of the Ray workers that train."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from ._section import Section


class ScalingSection(Section):
    """Workers of Ray Train."""

    num_workers: int | tuple[int, int] = Field(
        default=1,
        description="Training workers, one GPU each where there are GPUs; 0 = in this process without Ray; "
        "[min, max] = elastic.",
    )
    use_gpu: Literal["auto"] | bool = Field(default="auto", description='"auto" = if the cluster has any GPU.')
    resources_per_worker: dict[str, float] = Field(
        default_factory=dict, description="Ray resources of one worker, such as {CPU: 4, GPU: 0.5}; empty = defaults."
    )
    max_failures: int = Field(
        default=2, ge=-1, description="Restarts from the last checkpoint after a worker is lost; -1 = no limit."
    )
    address: str | None = Field(
        default=None, description="Ray cluster to join; None = RAY_ADDRESS, else a local Ray for this run."
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        default="PACK", description="Workers close together or on different hosts."
    )
    worker_start_timeout_s: float = Field(
        default=60.0, gt=0, description="Seconds to wait until all workers have their resources."
    )

    @property
    def most_workers(self) -> int:
        """Number of workers, the largest one of an elastic run."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @field_validator("num_workers", mode="before")
    @classmethod
    def _read_num_workers(cls, value: Any) -> int | tuple[int, int]:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        if isinstance(value, list | tuple) and len(value) == 2:
            low, high = value
            if all(isinstance(v, int) and not isinstance(v, bool) for v in value) and 1 <= low <= high:
                return (low, high)
        raise ValueError("should be a whole number from 0 up, or [min, max] with 1 <= min <= max")

    @field_validator("use_gpu", mode="before")
    @classmethod
    def _read_use_gpu(cls, value: Any) -> bool | str:
        if isinstance(value, bool) or value == "auto":
            return value
        raise ValueError('should be "auto", true or false')

    @field_validator("resources_per_worker")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if amount < 0:
                raise ValueError(f"should hold amounts of at least 0, {name} has {amount:g}")
        return resources
