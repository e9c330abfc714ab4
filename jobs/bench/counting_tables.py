"""The tables of docs/gpu.md: what a GPU would take by counting, for the presets and for inference.

    python -m jobs.bench.counting_tables            some ten minutes on one core

Nothing in them is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from jobs.bench.counting import CARD_24GB, H200, Device
from jobs.bench.counting_sam3 import FULL_SIZE, Counted, count_inference, count_training
from jobs.bench.gpu_training import Case, Preset
from sam3lora.model.components import COMPONENTS

DEVICES = (H200, CARD_24GB)
STAGES = (
    "ViT trunk",
    "neck",
    "text encoder",
    "geometry encoder",
    "DETR encoder",
    "DETR decoder",
    "scoring",
    "pixel decoder",
    "masks",
    "loss",
)


def assumptions() -> list[str]:
    return [_assumption(device) for device in DEVICES]


def inference_table(model_name: str = FULL_SIZE) -> list[str]:
    """Operations, bytes and time of every stage for one image and one prompt."""
    return _stage_table(count_inference(1, model_name), kept=False)


def training_stages_table(preset: str, model_name: str = FULL_SIZE) -> list[str]:
    """Forward and backward of one image with four prompts, nothing recomputed, and what the backward pass needs."""
    return _stage_table(count_training(Case(preset, checkpointing=()), model_name), kept=True)


def training_table(
    presets: Sequence[str] = ("light", "balanced", "full", "maximum"),
    batches: Sequence[int] = (1, 2, 4),
    model_name: str = FULL_SIZE,
) -> Iterator[str]:
    """Memory and time of a step with four prompts an image, for each preset with and without recomputing."""
    names = ["preset", "recomputed", "images", "memory GB", "of it weights", "TFLOP"]
    yield _row([*names, *(f"images/s, {device.name}" for device in DEVICES)])
    yield _row(["---"] * 2 + ["---:"] * (len(names) - 2 + len(DEVICES)))
    for preset in presets:
        shipped = Preset.read(preset).checkpointing
        ways = [Case(preset, checkpointing=chosen) for chosen in dict.fromkeys([shipped, (), COMPONENTS])]
        if preset == "light":
            ways.append(replace(ways[0], cached=True))
        for way in ways:
            for images in batches:
                case = replace(way, images=images)
                counted = count_training(case, model_name)
                name = f"{preset}{', trunk cached' if case.cached else ''}"
                recomputed = (
                    "all" if case.checkpointing == COMPONENTS else ", ".join(case.checkpointing or ("nothing",))
                )
                recomputed += " (as shipped)" if case.checkpointing == shipped else ""
                yield _row([name, recomputed, str(images), *_figures(counted, images)])


def _figures(counted: Counted, images: int) -> list[str]:
    memory, total = counted.memory_bytes / 1e9, counted.total
    speeds = [
        f"{images / total.seconds(device):.1f}" if memory < device.memory_gb else "does not fit" for device in DEVICES
    ]
    return [f"{memory:.1f}", f"{counted.weights / 1e9:.1f}", f"{total.operations / 1e12:.1f}", *speeds]


def _stage_table(counted: Counted, *, kept: bool) -> list[str]:
    names = ["stage", "GFLOP", "GB moved", "kernels", *(["kept MB"] if kept else [])]
    lines = [_row([*names, *(f"ms, {device.name}" for device in DEVICES)])]
    lines.append(_row(["---"] + ["---:"] * (len(names) - 1 + len(DEVICES))))
    stages = [(name, counted.by_stage[name], counted.kept.get(name, 0)) for name in STAGES if name in counted.by_stage]
    for name, tally, held in [*stages, ("all", counted.total, sum(counted.kept.values()))]:
        cells = [name, f"{tally.operations / 1e9:,.1f}", f"{tally.bytes_moved / 1e9:.2f}", str(tally.num_kernels)]
        cells += [f"{held / 1e6:,.0f}"] if kept else []
        lines.append(_row([*cells, *(f"{tally.seconds(device) * 1000:.2f}" for device in DEVICES)]))
    return lines


def _assumption(device: Device) -> str:
    return (
        f"- {device.name}: {device.peak / 1e12:.0f} TFLOP/s dense bfloat16 and {device.bandwidth / 1e12:.1f} TB/s by "
        f"the data sheet, of which {device.share:.0%} and {device.bandwidth_share:.0%} are assumed to be reached; "
        f"{device.launch_s * 1e6:.0f} us from one kernel to the next."
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    for line in [*assumptions(), "", *inference_table(), ""]:
        print(line)
    for preset in ("light", "maximum"):
        print(f"{preset}:\n\n" + "\n".join(training_stages_table(preset)) + "\n", flush=True)
    for line in training_table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
