"""Prompts, or labels of pixels, on very many images: Ray Data hands shards of them to model replicas, and finished
parts survive any crash.

list the images -> leave out what finished parts hold -> shards -> replicas write parts -> merge
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from sam3lora.cluster import check_job_path, ray_session
from sam3lora.config.post_processing import PostProcessing, PostProcessingOptions
from sam3lora.data.fault_report import fault_lines
from sam3lora.errors import RunFailed, UserError
from sam3lora.inference.batch.image_list import ImageSource, choose_categories, common_folder, list_images
from sam3lora.inference.batch.merge import write_bad_images, write_dataset, write_predictions
from sam3lora.inference.batch.output_folder import BAD_IMAGES, DATASET, PREDICTIONS, open_output, read_parts
from sam3lora.inference.batch.worker import ModelChoice, ShardWorker, WorkerSettings
from sam3lora.inference.dense.predictor import settings_of
from sam3lora.local_paths import absolute_base, refuse_bad_path
from sam3lora.local_ray import environment
from sam3lora.model.adapter.folder import CONFIG_FILE, WEIGHTS_FILE, is_adapter_folder, read_metadata
from sam3lora.model.adapter.folder_files import HEAD_FILE
from sam3lora.model.adapter.metadata import is_dense_folder, recorded_post_processing
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.progress import Progress

_BATCHES_PER_SHARD = 4  # what is done again after a crash, against the number of files
_MOST_CPUS = 4  # of a worker: so that reading images keeps up with the model
_MOST_BLOCKS = 4096  # a block costs Ray Data some milliseconds

_Nodes = Sequence[dict[str, float]]


@dataclass
class BatchSummary:
    """What a batch run came to.

    ``num_before`` of the ``num_images`` were finished by earlier starts. ``bad_images`` holds `file_name`, `path` and
    `reason` of those that could not be read, or that the model failed on. ``seconds`` is the wall clock of this start.
    """

    output: Path
    num_images: int
    num_before: int
    num_detections: int
    seconds: float
    bad_images: list[dict[str, Any]] = field(repr=False)
    found: str = "detections"

    def in_words(self) -> str:
        """The summary as lines for people; at most ten bad images are named."""
        good = self.num_images - len(self.bad_images)
        found = f"{self.num_detections} {self.found}"
        lines = [f"{good} of {self.num_images} images, {found}, {self.seconds:.0f} s: {self.output}"]
        if self.bad_images:
            lines += [f"{len(self.bad_images)} gave no result, see {self.output / BAD_IMAGES}:"]
            lines += [f"  {bad['file_name']}: {bad['reason']}" for bad in self.bad_images[:10]]
        return "\n".join(lines)


def predict_batch(
    source: str | Path,
    output: str | Path,
    prompts: Sequence[str] = (),
    *,
    choice: ModelChoice | None = None,
    post: PostProcessingOptions | None = None,
    num_workers: int | None = None,
    batch_size: int = 4,
    use_gpu: bool | None = None,
    overlays: bool = False,
    probabilities: bool = False,
    dataset: bool = True,
    overwrite: bool = False,
    address: str | None = None,
    progress: bool = True,
) -> BatchSummary:
    """Ask every image for the prompts, on as many machines as the cluster has; go on where an earlier start stopped.

    ``output`` then holds `predictions.json` (COCO results), `bad_images.json`, and `dataset/train`, the results as
    labels to check and train on. Images that an earlier start has finished are not done again, bad ones are.

    A dense folder is asked for the label of each pixel instead: `output` gets the files of `DenseFiles` as well, and
    the results are one for each foreground class of an image.

    Args:
        source: A folder, a list of paths (.txt) or a COCO file (.json).
        prompts: The categories of the results, in this order; none with a dense folder.
        choice: Model and adapter; None takes the built-in tiny model.
        post: Fields of `PostProcessing`; the others are as the adapter records them, or the defaults. A dense folder
            takes what `settings_of` says.
        num_workers: Model replicas; None takes one for each GPU, or one for every 4 CPUs.
        use_gpu: None takes GPUs if the cluster has any.
        overlays: Draw the results into `output/overlays`.
        probabilities: Write those of a dense folder's classes into `output/probabilities`.
        overwrite: Remove an earlier run in `output` first.
        address: Ray cluster; None joins the one that runs here or in RAY_ADDRESS, else starts a local one.

    Raises:
        UserError: Nothing to read, a mistake in model, prompts or settings, or `output` holds another run or is being
            written to.
        RunFailed: Workers died again and again; what is finished is kept.
    """
    started = time.monotonic()
    if batch_size < 1 or (num_workers is not None and num_workers < 1):
        raise UserError(f"batch_size and num_workers must be positive, got {batch_size} and {num_workers}")
    source, output, choice = _absolute(source, output, choice or ModelChoice())
    dense = _dense_settings(choice, post or {}, prompts, probabilities)
    identity, settled = _identity(choice, post or {}, dense)
    images, known, faults = list_images(source, leave_out=output)
    categories = choose_categories(prompts if dense is None else dense.foreground, known)
    for line in fault_lines(faults) if progress else ():
        print(line, flush=True)
    identity |= {"categories": categories, "overlays": overlays}
    if dense is not None:
        identity["probabilities"] = probabilities
    with open_output(output, identity, overwrite=overwrite):
        before = read_parts(output)
        pending = [image for image in images if image.path not in before.places or image.path in before.errors]
        pending = list({image.path: image for image in pending}.values())

        if pending:
            settings = WorkerSettings(
                output=output,
                input_root=Path(common_folder([image.path for image in images])),
                run=uuid.uuid4().hex[:8],
                choice=choice,
                categories=categories,
                post=settled,
                batch_size=batch_size,
                overlays=overlays,
                base_fingerprint=before.base_fingerprint,
                dense=dense,
                probabilities=probabilities,
            )
            # Else Ray warns on stderr of the way in which Ray Data hands its actors their arguments.
            quiet = {"RAY_BACKEND_LOG_LEVEL": os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal")}
            cpus = max(os.cpu_count() or 1, num_workers or 1)
            with (
                environment(quiet),
                ray_session(address, num_cpus=cpus),
                Progress(
                    len(images), done_before=len(images) - len(pending), style="auto" if progress else "off"
                ) as bar,
            ):
                num_bad = 0
                for counts in _run(pending, settings, num_workers, use_gpu):
                    num_bad += counts["num_bad"]
                    bar.advance(counts["num_images"], note=f"{num_bad} bad" if num_bad else None)

        finished = read_parts(output)
        if lost := [image.path for image in images if image.path not in finished.places]:
            raise RunFailed(f"{len(lost)} images have no result, the first is {lost[0]}: start again to go on")
        num_detections = write_predictions(output / PREDICTIONS, images, finished)
        bad_images = write_bad_images(output / BAD_IMAGES, images, finished)
        if len(bad_images) == len(images):
            raise UserError(f"none of {len(images)} images gave a result, see {output / BAD_IMAGES}")
        if dataset:
            write_dataset(output / DATASET, images, finished, categories)
        seconds = time.monotonic() - started
        found = "detections" if dense is None else "regions, one for each class of an image"
        return BatchSummary(output, len(images), len(images) - len(pending), num_detections, seconds, bad_images, found)


def _run(
    pending: Sequence[ImageSource], settings: WorkerSettings, num_workers: int | None, use_gpu: bool | None
) -> Iterator[dict[str, Any]]:
    """Counts of each shard, as workers finish them."""
    import ray
    from ray.exceptions import RayError

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    use_gpu = gpus > 0 if use_gpu is None else use_gpu
    num_workers = num_workers or gpus * use_gpu or int(max(1, sum(node.get("CPU", 0) for node in nodes) // 4))
    cpus = _cpus_per_worker(nodes, num_workers, use_gpu)
    settings = replace(settings, device="cuda" if use_gpu else "cpu", num_threads=cpus)
    rows = _shards(pending, settings.batch_size, num_workers)
    with _quiet_data():
        shards = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS))
        results = shards.map(
            cast(Any, ShardWorker),
            fn_constructor_args=(settings,),
            compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(rows))),
            num_cpus=cpus,
            num_gpus=int(use_gpu),
        )
    kept = f"What is finished is kept in {settings.output}: start again to go on"
    try:
        for counts in results.iter_rows():
            if counts["mistake"]:
                raise UserError(counts["mistake"])
            if counts["failure"]:
                raise RunFailed(f"{counts['failure']}. {kept}")
            yield counts
    except RayError as error:
        raise RunFailed(f"the workers stopped: {error}\n{kept}") from error


def _shards(pending: Sequence[ImageSource], batch_size: int, num_workers: int) -> list[dict[str, Any]]:
    """Rows for the workers: some batches each, fewer where that would leave workers without any."""
    batches_each = -(-len(pending) // (batch_size * num_workers))
    size = batch_size * min(_BATCHES_PER_SHARD, batches_each)
    starts = range(0, len(pending), size)
    return [{"number": n, "images": json.dumps(pending[start : start + size])} for n, start in enumerate(starts)]


def _cpus_per_worker(nodes: _Nodes, num_workers: int, use_gpu: bool) -> int:
    """As many CPUs as every worker can have, up to `_MOST_CPUS`; a worker with a GPU has one of its own."""
    places = [
        sum(int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if use_gpu else num_workers)) for node in nodes)
        for cpus in range(1, _MOST_CPUS + 1)
    ]
    fitting = [cpus for cpus, room in enumerate(places, start=1) if room >= num_workers]
    if not fitting:
        needs, hint = ("a GPU and a CPU", ", or compute without GPUs (--device cpu)") if use_gpu else ("a CPU", "")
        raise UserError(
            f"--num-workers {num_workers} with {needs} for each: the cluster has room for {places[0]}. Ask for "
            f"fewer{hint}"
        )
    return fitting[-1]


def _absolute(source: str | Path, output: str | Path, choice: ModelChoice) -> tuple[Path, Path, ModelChoice]:
    """Paths as workers need them, which run in other folders."""
    given = {"--input": source, "--output": output, "--weights": choice.adapter}
    for option, path in given.items():
        if path:
            refuse_bad_path(path, option)
            check_job_path(path, option)
    adapter = choice.adapter and os.path.abspath(Path(choice.adapter).expanduser())
    model = choice.model and absolute_base(choice.model)
    resolved = [Path(os.path.abspath(Path(path).expanduser())) for path in (source, output)]
    return resolved[0], resolved[1], replace(choice, adapter=adapter, model=model)


def _dense_settings(
    choice: ModelChoice, post: PostProcessingOptions, prompts: Sequence[str], probabilities: bool
) -> DenseSettings | None:
    """Those of a dense folder; None where prompts are asked."""
    if choice.adapter is None or not is_dense_folder(choice.adapter):
        if probabilities:
            raise UserError("--probabilities has no effect without a dense adapter: leave it out")
        return None
    if prompts:
        raise UserError(f"--prompt has no effect with {choice.adapter}, which labels each pixel: leave it out")
    return settings_of(choice.adapter, post)


def _identity(
    choice: ModelChoice, post: PostProcessingOptions, dense: DenseSettings | None
) -> tuple[dict[str, Any], PostProcessing]:
    """The settings that decide the results, as JSON values (parts of runs that differ in them do not go together), and
    the post-processing among them."""
    metadata = digest = None
    if choice.adapter:
        folder = Path(choice.adapter)
        if not is_adapter_folder(folder):
            raise UserError(f"--weights {folder} is no adapter folder: expected {CONFIG_FILE} and {WEIGHTS_FILE} in it")
        metadata = read_metadata(folder)
        names = (CONFIG_FILE, WEIGHTS_FILE) if dense is None else (CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE)
        files = [folder / name for name in names if (folder / name).is_file()]
        digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]
    model = {
        "model": choice.model or (metadata and metadata.base_model) or "tiny",
        "revision": choice.revision,
        "resolution": choice.resolution,
        "adapter": digest,
    }
    if dense is not None:
        return model | {"dense": dense.to_dict()}, PostProcessing()
    settled = recorded_post_processing(metadata).changed(**post)
    return model | settled.model_dump(mode="json"), settled


@contextlib.contextmanager
def _quiet_data() -> Iterator[None]:
    """No progress bars and start messages of Ray Data's own, for datasets made in the block."""
    from ray.data import DataContext

    for name in ("progress", "execution.streaming_executor"):
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with DataContext.current(context):
        yield
