"""Loss curves of a run as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_plots(lines: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw ``loss.png`` (training and validation) and ``terms.png`` (each term) from the lines of ``metrics.jsonl``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    epochs = [line for line in lines if line["kind"] == "epoch"]
    if not epochs:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [line for line in lines if line["kind"] == "step"]
    axis.plot([s["step"] for s in steps], [s["loss"] for s in steps], color="0.8", linewidth=1, label="training, step")
    base = [line for line in lines if line["kind"] == "base" and line["valid_loss"] is not None]
    if base:
        axis.axhline(base[-1]["valid_loss"], color="0.5", linestyle=":", label="validation, base model")
    for key, label, style in (("train_loss", "training", "o-"), ("valid_loss", "validation", "s-")):
        points = [(line["step"], line[key]) for line in epochs if line.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, markersize=4, label=label)
    axis.set(xlabel="step", ylabel="loss", title="Loss")
    axis.grid(alpha=0.3)
    axis.legend()
    written = [folder / "loss.png"]
    figure.savefig(written[0], dpi=130)
    plt.close(figure)

    names = [name for name in epochs[-1]["train_terms"] if not name.endswith("_o2m")]
    columns = 3
    figure, axes = plt.subplots(
        -(-len(names) // columns), columns, figsize=(10, 2.6 * -(-len(names) // columns)), layout="constrained"
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for key, label in (("train_terms", "training"), ("valid_terms", "validation")):
            points = [(line["step"], line[key][name]) for line in epochs if line[key].get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8)
    written.append(folder / "terms.png")
    figure.savefig(written[1], dpi=130)
    plt.close(figure)
    return written
