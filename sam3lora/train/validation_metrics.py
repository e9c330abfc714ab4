"""mAP of the adapter on the validation split while it trains; each worker detects on its own share of the images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sam3lora.evaluate.coco_map import coco_map
from sam3lora.evaluate.split import evaluate_split
from sam3lora.train import distributed

if TYPE_CHECKING:
    from sam3lora.train.setup import Worker


def validation_metrics(worker: Worker) -> dict[str, Any]:
    """``map``, ``map_50`` and ``map_75`` over the split, or its first ``evaluation.num_samples`` images."""
    index = worker.data.valid
    assert index is not None
    rows = list(range(len(index)))[: worker.config.evaluation.num_samples]
    mine = rows[distributed.rank() :: distributed.world_size()]
    share: dict[str, list] = {"images": [], "annotations": [], "categories": [], "predictions": []}
    if mine:
        found = evaluate_split(
            worker.runner.staged,
            worker.tokenizer,
            index.select_rows(mine),
            resolution=worker.data.valid_settings.resolution,
            names=worker.data.valid_settings.names,
            prompts=worker.data.valid_settings.prompts_map,
            device=worker.device,
            batch_size=worker.config.training.batch_size,
            max_prompts_per_forward=worker.config.training.max_prompts_per_forward,
            text_cache=worker.runner.text.kept(),
        )
        share = {**found.ground_truth, "predictions": found.predictions}
    shares = [other for other in distributed.gather_objects(share) if other["images"]]
    truth = {key: [item for other in shares for item in other[key]] for key in ("images", "annotations")}
    truth["categories"] = shares[0]["categories"]
    result = coco_map(truth, [item for other in shares for item in other["predictions"]])
    return {"map": result.map, "map_50": result.map_50, "map_75": result.map_75}
