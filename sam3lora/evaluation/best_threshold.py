"""Recording the threshold of the best cgF1 in an adapter."""

from __future__ import annotations

from pathlib import Path

from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError
from sam3lora.evaluation.metrics.measure import SplitMetrics
from sam3lora.model.adapter.folder import record_post_processing


def record_best_threshold(metrics: SplitMetrics, adapter: str | Path, *, per_prompt: bool = False) -> str:
    """Write the threshold into the adapter folder, with the post-processing that it was measured with.

    Args:
        metrics: Of this adapter.
        adapter: Adapter folder.
        per_prompt: Also a threshold for each prompt; a prompt that has none of its own uses the overall one.

    Returns:
        A line that says what was written.

    Raises:
        UserError: No threshold finds anything right, or the folder cannot be written.
    """
    sweep = metrics.sweep
    if sweep is None or sweep.best_threshold is None:
        raise UserError(f"{metrics.label}: no threshold was saved, because no detection is right at any threshold")
    thresholds = {}
    if per_prompt:
        for category in metrics.ground_truth["categories"]:
            curve = sweep.per_category.get(category["id"])
            if curve is not None and curve.best_threshold is not None:
                thresholds[category["prompt"]] = curve.best_threshold
    measured = PostProcessing(**{name: metrics.settings[name] for name in PostProcessing.model_fields})
    record_post_processing(adapter, measured.changed(threshold=sweep.best_threshold, prompt_thresholds=thresholds))
    own = "".join(f", {prompt}: {value:.2f}" for prompt, value in thresholds.items())
    return f"{metrics.label}: saved threshold {sweep.best_threshold:.2f}{own} in {adapter}"
