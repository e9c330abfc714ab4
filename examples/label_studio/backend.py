"""A Label Studio ML backend that uses a running sam3lora service.

    python examples/label_studio/backend.py --server http://127.0.0.1:8000 --label-studio-url http://localhost:8080

Text prompts are the project's labels. With a smart tool, what the annotator clicked or drew is outlined, or is the
example of what to find. An adapter of task dense gives the pixels of the labels that are its classes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI, HTTPException
from label_config import ConfigFault, LabelConfig, read_label_config
from pydantic import BaseModel
from regions import Drawn, brush_region, mask_format, read_drawn, regions_of, regions_of_object, rows_under
from task_images import ImageFault, TaskImages

from sam3lora.client import Client, SegmentationError

TASKS_AT_ONCE = 4  # the service batches what comes together
TIMEOUT_S = 90.0  # Label Studio gives up after 100 s
IMAGE_FAULTS = ("invalid_image", "unsupported_image", "image_too_large", "body_too_large")  # types of the service

logger = logging.getLogger("label_studio_backend")


class PredictRequest(BaseModel):
    """What Label Studio posts to `/predict`; it sends more, which is not needed here."""

    tasks: list[dict[str, Any]]
    label_config: str
    params: dict[str, Any] | None = None


class Backend:
    """Predicts the regions of tasks.

    Args:
        client: Client of the sam3lora service.
        images: Reads the images of tasks.
        adapter: Id of an adapter; None asks the base model.
        threshold: Lowest score of a region; None takes the adapter's recorded post-processing.
        all_alike: With a smart tool, return everything that looks like what was drawn, not only the object under it.
        clicks: Whether the service answers clicks. If not, what a smart tool draws is an example.
    """

    def __init__(
        self,
        client: Client,
        images: TaskImages,
        *,
        adapter: str | None = None,
        threshold: float | None = None,
        all_alike: bool = False,
        clicks: bool = False,
    ) -> None:
        self.model_version = f"sam3lora-{adapter or 'base'}"
        self._client = client
        self._images = images
        self._options = {"adapter": adapter, "threshold": threshold}
        self._all_alike = all_alike
        self._clicks = clicks

    def predict(self, request: PredictRequest) -> list[dict[str, Any]]:
        """One prediction for each task, in their order.

        A task whose image cannot be read gets an empty one, so that the other predictions are not lost.

        Raises:
            ConfigFault: The project has no control that this backend can fill.
            ImageFault: There is a single task, and its image cannot be read.
            SegmentationError: The service does not respond, or refuses the request.
        """
        config = read_label_config(request.label_config)
        drawn = read_drawn((request.params or {}).get("context"))

        def answer(task: Mapping[str, Any]) -> list[dict[str, Any]]:
            try:
                return self._regions(task, config, drawn)
            except (ImageFault, SegmentationError) as error:
                of_this_image = isinstance(error, ImageFault) or error.type in IMAGE_FAULTS
                if len(request.tasks) == 1 or not of_this_image:
                    raise
                logger.warning("task %s is left empty: %s", task.get("id"), error)
                return []

        with ThreadPoolExecutor(TASKS_AT_ONCE) as pool:
            return [self._prediction(regions) for regions in pool.map(answer, request.tasks)]

    def _regions(self, task: Mapping[str, Any], config: LabelConfig, drawn: Drawn | None) -> list[dict[str, Any]]:
        if drawn and self._clicks and not self._all_alike:
            return self._clicked(task, config, drawn)
        options = {**self._options, "masks": mask_format(config)}
        prompts = dict(config.prompts)
        if drawn:
            prompts = {drawn.label: config.prompts.get(drawn.label, drawn.label)}
            options["boxes"] = drawn.as_examples()
        results = self._client.segment(self._image(task, config), prompts.values(), **options)
        wanted_xyxy = []
        if drawn and not self._all_alike:
            wanted_xyxy = [xyxy for xyxy, is_wanted in drawn.as_examples() if is_wanted]
        regions = []
        for label, result in zip(prompts, results, strict=True):
            rows = rows_under(result.boxes_xyxy, wanted_xyxy) if wanted_xyxy else None
            regions += regions_of(result, label, config, rows)
        return regions

    def _clicked(self, task: Mapping[str, Any], config: LabelConfig, drawn: Drawn) -> list[dict[str, Any]]:
        """The object that clicks and a rectangle show, with the label that the annotator has chosen."""
        options = {"adapter": self._options["adapter"], "masks": mask_format(config)}
        (found,) = self._client.refine(self._image(task, config), drawn.as_object(), **options)
        return list(regions_of_object(found, drawn.label, config))

    def _image(self, task: Mapping[str, Any], config: LabelConfig) -> bytes:
        address = task.get("data", {}).get(config.data_key)
        if not isinstance(address, str):
            raise ImageFault(f"the task has no image address under {config.data_key!r}")
        return self._images.read(address)

    def _prediction(self, regions: list[dict[str, Any]]) -> dict[str, Any]:
        score = sum(region["score"] for region in regions) / max(1, len(regions))
        return {"model_version": self.model_version, "score": score, "result": regions}


class DenseBackend(Backend):
    """Predicts a brush mask of the pixels of each label, by an adapter of task dense.

    A label is asked for if its prompt, or the label itself, is a class of the adapter. What a smart tool draws is not
    looked at.

    Args:
        classes: Of the adapter.
        threshold: Lowest probability of a class that is found by itself; None takes the adapter's own.
    """

    def __init__(
        self,
        client: Client,
        images: TaskImages,
        *,
        adapter: str,
        classes: Sequence[str],
        threshold: float | None = None,
    ) -> None:
        super().__init__(client, images, adapter=adapter, threshold=threshold)
        self._classes = frozenset(classes)

    def _regions(self, task: Mapping[str, Any], config: LabelConfig, drawn: Drawn | None) -> list[dict[str, Any]]:
        if config.control != "brushlabels":
            raise ConfigFault("an adapter of task dense labels pixels: expected BrushLabels")
        wanted = {label: name for label, name in config.prompts.items() if name in self._classes}
        if not wanted:
            known = ", ".join(sorted(self._classes))
            raise ConfigFault(f"expected labels that are classes of the adapter ({known}); this project has none")
        found = self._client.dense(
            self._image(task, config), output="rle", classes=dict.fromkeys(wanted.values()), **self._options
        )
        return [brush_region(found.mask(name), label, config) for label, name in wanted.items() if found.area_px[name]]


def make_backend(client: Client, images: TaskImages, *, adapter: str | None, **options: Any) -> Backend:
    """The backend for an adapter of either task, or for the base model.

    Args:
        options: `threshold` and `all_alike` of `Backend`.

    Raises:
        SegmentationError: The service does not respond.
    """
    if adapter is not None:
        for known in client.adapters(search=adapter):
            if known.id == adapter and known.task == "dense":
                threshold = options["threshold"]
                return DenseBackend(client, images, adapter=adapter, classes=known.classes, threshold=threshold)
    return Backend(client, images, adapter=adapter, clicks=client.answers_clicks(), **options)


def create_app(backend: Backend) -> FastAPI:
    """The HTTP application that Label Studio expects."""
    app = FastAPI(title="sam3lora for Label Studio")

    @app.post("/predict")
    def predict(request: PredictRequest) -> dict[str, Any]:
        try:
            return {"results": backend.predict(request)}
        except ConfigFault as error:
            raise HTTPException(400, str(error)) from None
        except ImageFault as error:
            raise HTTPException(422, str(error)) from None
        except SegmentationError as error:
            raise HTTPException(502, str(error)) from None

    @app.post("/setup")
    def setup() -> dict[str, str]:
        return {"model_version": backend.model_version}

    @app.get("/")
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "UP", "model_class": "sam3lora"}

    @app.post("/webhook")
    def webhook() -> dict[str, str]:
        """Label Studio reports what annotators do; this backend ignores it."""
        return {"status": "ignored"}

    return app


def main(
    server: Annotated[str, typer.Option(help="The sam3lora service.")] = "http://127.0.0.1:8000",
    label_studio_url: Annotated[str | None, typer.Option(help="Label Studio, for the images of tasks.")] = None,
    local_root: Annotated[Path | None, typer.Option(help="Folder of Label Studio's local storage.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Id of an adapter (default: the base model).")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Lowest score of a region (default: as recorded with the adapter).")
    ] = None,
    all_alike: Annotated[bool, typer.Option(help="Smart tools return everything alike, not one object.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9090,
) -> None:
    """Start the backend. SAM3LORA_API_KEY and LABEL_STUDIO_API_KEY are read from the environment."""
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs addresses
    images = TaskImages(label_studio_url, os.environ.get("LABEL_STUDIO_API_KEY"), local_root)
    with Client(server, api_key=os.environ.get("SAM3LORA_API_KEY"), timeout_s=TIMEOUT_S) as client:
        try:
            backend = make_backend(client, images, adapter=adapter, threshold=threshold, all_alike=all_alike)
        except SegmentationError as error:
            typer.echo(f"the service says nothing of its adapters: {error}", err=True)
            raise typer.Exit(1) from None
        uvicorn.run(create_app(backend), host=host, port=port)


if __name__ == "__main__":
    typer.run(main)
