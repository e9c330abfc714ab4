"""The whole configuration of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from ..local_paths import absolute_base, absolute_path
from ._section import LocalPath, Section
from .clicks import ClicksSection, clicks_problems
from .data import DataSection
from .dense import DenseSection, dense_problems
from .evaluation import EvaluationSection
from .logging import LoggingSection
from .lora import LoraSection
from .metrics import Task
from .model import ModelSection
from .scaling import ScalingSection
from .task_keys import metric_problems
from .training import TrainingSection

_DEFAULT_NEGATIVES = TrainingSection.model_fields["num_negatives"].default


class OutputSection(Section):
    """The run folder."""

    output_dir: LocalPath = Field(
        default="outputs/run",
        min_length=1,
        description="Folder of the run; when it is not set, outputs/<name of the preset or file>.",
    )


class Config(Section):
    """What a run is. Made by `load_config`; immutable."""

    task: Task = Field(
        default="detection",
        description="What is learned: the objects of prompts, with dense a label for each pixel, with clicks the mask "
        "of an object that is clicked on.",
    )
    model: ModelSection = Field(default_factory=ModelSection, description="The frozen base model.")
    lora: LoraSection = Field(description="The adapters.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="Data folder, batch, optimizer.")
    data: DataSection = Field(default_factory=DataSection, description="Prompts, negatives, augmentation.")
    dense: DenseSection = Field(default_factory=DenseSection, description="Classes and head of task dense.")
    clicks: ClicksSection = Field(default_factory=ClicksSection, description="Interactions of task clicks.")
    scaling: ScalingSection = Field(default_factory=ScalingSection, description="Workers.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="Detections and metrics.")
    output: OutputSection = Field(default_factory=OutputSection, description="The run folder.")
    logging: LoggingSection = Field(default_factory=LoggingSection, description="Messages, progress, plots.")

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        if problem := next(_task_problems(self), None):
            raise ValueError(problem)
        frozen = [name for name in self.training.component_learning_rates if name not in self.lora.components]
        if frozen:
            raise ValueError(
                f"training.component_learning_rates.{frozen[0]} has no effect: set lora.apply_to_{frozen[0]} to true"
            )
        if self.model.dtype == "bfloat16" and self.training.mixed_precision == "no":
            raise ValueError(
                'model.dtype "bfloat16" needs training.mixed_precision bf16, got no: change one of the two'
            )
        if self.model.quantization != "none" and self.training.mixed_precision == "no":
            raise ValueError(
                f'model.quantization "{self.model.quantization}" needs training.mixed_precision bf16, got no: change '
                "one of the two"
            )
        workers, images = self.scaling.most_workers, self.training.images_per_step
        if images is not None and workers > images:
            raise ValueError(
                f"scaling.num_workers {workers} is more than training.images_per_step {images}, so some workers would "
                f"have no image: use at most {images} workers, or set training.images_per_step to {workers} or more"
            )
        has_negatives = self.data.exhaustive or self.data.negative_prompts
        if not has_negatives and self.training.num_negatives not in (0, _DEFAULT_NEGATIVES):
            raise ValueError(
                "training.num_negatives has no effect while data.exhaustive is false and data.negative_prompts is "
                "empty: list negative_prompts, or set num_negatives to 0"
            )
        return self

    def changed(self, changes: Mapping[str, Any]) -> Config:
        """A copy with other values by dotted key, such as `{"training.data_dir": "datasets/potholes"}`.

        Raises:
            pydantic.ValidationError: A key or value that no configuration may have.
        """
        from .keys import set_key

        raw = self.model_dump()
        for key, value in changes.items():
            set_key(raw, key, value)
        return Config.model_validate(raw)

    def with_absolute_paths(self) -> Config:
        """A copy whose paths mean the same in every working directory, such as those of Ray workers."""
        paths = {
            "output.output_dir": self.output.output_dir,
            "training.data_dir": self.training.data_dir,
            "training.cache_dir": self.training.cache_dir,
        }
        if self.clicks.vision_adapter is not None:
            paths["clicks.vision_adapter"] = self.clicks.vision_adapter
        absolute = {key: absolute_path(path) for key, path in paths.items() if path is not None}
        return self.changed({**absolute, "model.name": absolute_base(self.model.name)})

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; `load_config` of it gives an equal configuration."""
        from .yaml_text import dump_yaml

        return dump_yaml(self.model_dump(mode="json"))


def _task_problems(config: Config) -> Iterator[str]:
    """What does not go with the task of a configuration, each as a line for its user."""
    for task, section in (("dense", DenseSection()), ("clicks", ClicksSection())):
        if config.task != task and getattr(config, task) != section:
            yield f"{task} has no effect while task is {config.task}: set task to {task}, or remove the section"
    if config.task == "dense":
        yield from dense_problems(config)
    elif config.task == "clicks":
        yield from clicks_problems(config)
    elif not config.lora.components:
        yield f"lora adapts nothing: set at least one of {', '.join(config.lora.flags())} to true"
    yield from metric_problems(config)
