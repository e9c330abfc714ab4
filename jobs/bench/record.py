"""Record what the product computes, and compare two such records: a change that should not alter numbers shows none.

    python jobs/bench/record.py make --root REPO --out BEFORE --inputs INPUTS --real-data COCO_FOLDER
    python jobs/bench/record.py make --root REPO --out AFTER --inputs INPUTS --extra infer="--some-new-option box"
    python jobs/bench/record.py diff BEFORE AFTER

Only interfaces that stay are used: the command line, HTTP and the files they write. Everything runs on the built-in
tiny model on a CPU. Data sets, images and adapters are made once, in the folder INPUTS, and used by every later run.

Suppression of overlapping detections in the version first recorded: `validate` and `compare` use the overlap of masks,
`infer`, `jobs/predict.py` and HTTP that of boxes (of masks where they merge). Where a later version has another
default, `--extra` asks for the old one.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

PRESETS = ("quick_test", "minimal", "light", "balanced", "full", "maximum", "production", "demo")
NUM_STEPS = 3
TRAIN = (
    "model.name=tiny model.dtype=float32 training.mixed_precision=no training.num_epochs=3 training.logging_steps=1 "
    f"training.max_steps={NUM_STEPS} training.num_workers=1 training.seed=7 evaluation.every_epochs=0 "
    "evaluation.base_loss=false logging.tensorboard=false logging.plots=false"
).split()
TRAININGS = {  # name -> preset, workers (0 = without Ray), further settings
    **{preset: (preset, 0, []) for preset in PRESETS},
    "minimal_bf16": ("minimal", 0, ["model.dtype=bfloat16", "training.mixed_precision=bf16"]),
    "quick_test_ray": ("quick_test", 1, []),
}
CPU = ["--device", "cpu"]
EVALUATE = ["--nms-iou", "0.7", "--max-detections", "100", "--batch-size", "4", *CPU]
SEPARATE = ["--prob-threshold", "0.3", "--no-merge"]
MERGE = ["--merge", "--merge-iou", "0.15"]
MERGED = ["--prob-threshold", "0.02", *MERGE]  # what is below the threshold is never merged, and little is above 0.3
# A low threshold and IoU, so that suppression has much to do and a change of its kind is seen.
FIND = ["--threshold", "0.05", "--nms-iou", "0.3", "--max-detections", "100", *CPU]
FIND_FIELDS = {"threshold": 0.05, "nms_iou": 0.3, "max_detections": 100}
GEAR_XYXY, OTHER_XYXY = [113, 278, 262, 476], [6, 2, 204, 180]  # in the sample image
BASE = {
    "model": {"name": "tiny"},
    "lora": {"rank": 4, "alpha": 8, "apply_to_detr_decoder": True, "apply_to_mask_decoder": True},
    # The rate is so low that another trial is the best one.
    "training": {"learning_rate": 1e-5, "num_epochs": 1, "max_steps": NUM_STEPS, "warmup_steps": 1, "num_workers": 1}
    | {"mixed_precision": "no"},
    "scaling": {"num_workers": 0},
}
SPACE = {
    "base": BASE,
    "parameters": {
        "lora.rank": {"choice": [2, 4, 8]},
        "lora.alpha": {"tied": "2 * lora.rank"},
        "training.learning_rate": {"loguniform": [1e-3, 1e-2]},
        "training.batch_size": {"choice": [2, 4]},
    },
    "search": {"algorithm": "random", "num_trials": 3, "seed": 5, "metric": "map", "max_concurrent": 1},
    "early_stopping": {"scheduler": "none"},  # a trial is stopped some time after the decision, not at a certain step
}
# Differ from run to run, or with the installation.
VOLATILE = {
    *("seconds", "time", "unix_time", "started_at", "ended_at", "sessions"),  # clocks
    *("images_per_second", "data_wait_share", "memory_mb", "timing_ms"),  # speed and memory
    *("request_id", "versions"),
}
ABOUT = "about.json"  # how the record was made: not compared


class Session:
    """One run of `make`: where things are, and the commands that were run."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.root, self.inputs, self.work = options.root, options.inputs, work
        self.extra = {name: shlex.split(words) for name, words in options.extra.items() if name != "segment"}
        self.extra_fields = json.loads(options.extra.get("segment", "{}"))
        self.commands: list[str] = []
        # One thread for each process: sums in another order would differ in their last digits.
        self.environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.environment["COLUMNS"] = "200"
        for name in ("RAY_ADDRESS", "SAM3LORA_API_KEYS", "PYTHONHASHSEED"):
            self.environment.pop(name, None)

    def command(self, verb: str, *words: str | Path | int) -> list[str]:
        """The words of a verb of the product, or of its batch job."""
        start = ["jobs/predict.py"] if verb == "predict" else ["-m", "sam3lora", *verb.split()]
        command = [*start, *map(str, words), *self.extra.get(verb, [])]
        self.commands.append(self.without_paths("python " + shlex.join(command)))
        return [sys.executable, *command]

    def run(self, verb: str, *words: str | Path | int) -> None:
        """Run a command to its end; one that fails ends the record."""
        command = self.command(verb, *words)
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            output = (done.stdout + done.stderr)[-3000:]
            raise SystemExit(f"exit status {done.returncode} of {self.commands[-1]} in {self.work}\n{output}")

    def without_paths(self, text: str) -> str:
        for name, path in (("INPUTS", self.inputs), ("WORK", self.work), ("ROOT", self.root)):
            text = text.replace(str(path), name)
        return text

    def clean(self, value: Any) -> Any:
        """A value without what differs from run to run, and without the paths of this machine."""
        if isinstance(value, dict):
            return {self.without_paths(str(k)): self.clean(item) for k, item in value.items() if k not in VOLATILE}
        if isinstance(value, list):
            return [self.clean(item) for item in value]
        return self.without_paths(value) if isinstance(value, str) else value


def make_inputs(session: Session, real_data: Path | None) -> None:
    """Fill the folder of inputs, unless that is done: a drawn set, some real images, a folder of images, adapters."""
    if session.inputs.exists():
        return
    scratch = session.work / "inputs"
    drawn = scratch / "drawn"
    session.run("data synth", drawn, "--num-train", 12, "--num-valid", 6, "--num-test", 4, "--seed", 7)
    if real_data is not None:
        shutil.copytree(real_data / "valid", scratch / "real" / "valid")
    shutil.copytree(session.root / "serve_app/samples", scratch / "adapters")
    shutil.copy(session.root / "serve_app/static/sample.jpg", scratch / "sample.jpg")
    images = scratch / "images"
    images.mkdir()
    for path in (*sorted(drawn.glob("valid/*.jpg"))[:3], scratch / "sample.jpg"):
        shutil.copy(path, images)
    (images / "broken.jpg").write_bytes((scratch / "sample.jpg").read_bytes()[:2000])
    shutil.copytree(scratch, session.inputs)


def record_train(session: Session) -> Iterator[tuple[str, Any]]:
    """Loss by term, gradient norm and learning rate of each step, and the adapter that three steps make.

    Each preset in the process itself; one of them on a Ray Train worker too, and one in bfloat16.
    """
    for name, (preset, workers, settings) in TRAININGS.items():
        folder = session.work / "train" / name
        options = ["--data-dir", session.inputs / "drawn", "--output-dir", folder, "--num-workers", workers]
        session.run("train", preset, *TRAIN, *settings, *options, *CPU)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kinds = ("start", "step", "epoch", "warning")
        found = {kind: [line for line in lines if line["kind"] == kind] for kind in kinds}
        assert len(found["step"]) == NUM_STEPS, lines
        yield f"train_{name}", {**found, "adapter": adapter_weights(folder / "last")}


def adapter_weights(folder: Path) -> dict[str, Any]:
    """Names, shapes and size of an adapter's tensors, in short: a changed name or shape changes the list of shapes."""
    from safetensors.numpy import load_file  # the file format, not a module of the product

    tensors = load_file(folder / "adapter_model.safetensors")
    shapes: dict[str, int] = defaultdict(int)
    for name, tensor in tensors.items():
        without_number = re.sub(r"[.]\d+[.]", ".N.", name)
        shapes[f"{without_number} {list(tensor.shape)}"] += 1
    norm = math.sqrt(sum(float((tensor.astype("float64") ** 2).sum()) for tensor in tensors.values()))
    return {"shapes": shapes, "parameters": sum(tensor.size for tensor in tensors.values()), "norm": norm}


def record_validate(session: Session) -> Iterator[tuple[str, Any]]:
    """Metrics and detections of the base and an adapter; one of the runs on a Ray worker."""
    weights = ["--weights", session.inputs / "adapters/parts", "--use-base-model"]
    data = {"drawn": [session.inputs / "drawn"], "real": [session.inputs / "real", "--num-samples", 6]}
    for data_name, words in data.items():
        if not words[0].is_dir():
            continue
        for merge_name, merge, workers in (("separate", SEPARATE, 0), ("merged", MERGED, int(data_name == "drawn"))):
            folder = session.work / "validate" / f"{data_name}_{merge_name}"
            where = ["--val-data-dir", *words, "--num-workers", workers, "--output", folder]
            session.run("validate", *weights, *where, *EVALUATE, *merge)
            files = {label: by_image(read(folder / label / "predictions.json")) for label in ("base", "parts")}
            yield f"validate_{folder.name}", {"metrics": read(folder / "metrics.json"), "predictions": files}


def record_compare(session: Session) -> Iterator[tuple[str, Any]]:
    """Two adapters against the base."""
    folder, adapters = session.work / "compare", session.inputs / "adapters"
    where = ["--val-data-dir", session.inputs / "drawn", "--num-workers", 0, "--output", folder]
    session.run("compare", "--weights", adapters / "parts", adapters / "parts-light", *where, *EVALUATE, *SEPARATE)
    yield "compare", read(folder / "comparison.json")


def record_infer(session: Session) -> Iterator[tuple[str, Any]]:
    """Detections of single images and of a folder."""
    sample, folder, adapters = session.inputs / "sample.jpg", session.work / "infer", session.inputs / "adapters"
    folder.mkdir()
    prompts = ["--prompt", "gear", "arrow"]
    boxes = ["--box", *GEAR_XYXY, "--negative-box", *OTHER_XYXY]
    cases = {
        "adapter": ["--image", sample, "--weights", adapters / "parts", *prompts],
        "merged": ["--image", sample, "--weights", adapters / "parts", *prompts, *MERGE],
        "boxes": ["--image", sample, "--model", "tiny", *boxes],
        "folder": [
            "--image",
            session.inputs / "images",
            "--weights",
            adapters / "parts-light",
            "--prompt",
            "bolt",
            "--no-masks",
        ],
    }
    for name, words in cases.items():
        picture = folder / ("pictures" if name == "folder" else f"{name}.png")
        session.run("infer", *words, *FIND, "--output", picture, "--json", folder / f"{name}.json")
        yield f"infer_{name}", read(folder / f"{name}.json")


def record_predict(session: Session) -> Iterator[tuple[str, Any]]:
    """The batch job on a folder with a broken image: COCO results and the data set made of them."""
    folder = session.work / "predict"
    asked = ["--input", session.inputs / "images", "--prompt", "gear", "arrow", "bolt", "capsule"]
    weights = ["--weights", session.inputs / "adapters/parts", "--num-workers", 1, "--batch-size", 2]
    session.run("predict", *asked, *weights, *FIND, "--output", folder)
    dataset = read(folder / "dataset/train/_annotations.coco.json")
    dataset["annotations"] = by_image(dataset["annotations"])
    results = {"predictions": by_image(read(folder / "predictions.json")), "dataset": dataset}
    yield "predict", results | {"bad_images": read(folder / "bad_images.json")}


def record_http(session: Session) -> Iterator[tuple[str, Any]]:
    """Answers of the service, one request at a time; and that nothing of it is left when it has been stopped."""
    image = (session.inputs / "sample.jpg").read_bytes()
    encoded = {"image_base64": base64.b64encode(image).decode()}
    fields = {**FIND_FIELDS, **session.extra_fields}
    gear = {"xyxy": GEAR_XYXY, "label": 1}
    not_these = {"xyxy": OTHER_XYXY, "label": 0}
    segment: dict[str, dict[str, Any]] = {
        "base": {"prompts": ["gear"], "threshold": 0.0},
        "parts": {"prompts": ["gear", "arrow"], "adapter": "parts"},
        "parts-light": {"prompts": ["gear", "arrow"], "adapter": "parts-light"},
        "two_prompts": {"prompts": ["arrow", "bolt"], "adapter": "parts"},
        "box": {"boxes": [gear]},
        "box_and_prompt": {"prompts": ["gear"], "boxes": [gear, not_these], "adapter": "parts"},
        "polygon": {"prompts": ["gear"], "adapter": "parts", "masks": "polygon"},
        "png": {"prompts": ["gear"], "adapter": "parts", "masks": "png", "threshold": 0.5},
        "no_masks": {"prompts": ["gear", "arrow"], "adapter": "parts", "masks": "none"},
        "merge": {"prompts": ["gear", "arrow"], "adapter": "parts", "merge": True, "merge_iou": 0.15},
        "other_settings": {"prompts": ["gear"], "adapter": "parts", "threshold": 0.2, "nms_iou": 0.7},
        "few": {"prompts": ["gear"], "adapter": "parts", "max_detections": 2},
        "error_adapter": {"prompts": ["gear"], "adapter": "no-such-adapter"},
        "error_prompts": {"prompts": []},
        "error_empty_prompt": {"prompts": [" "]},
        "error_image": {"prompts": ["gear"], "image_base64": base64.b64encode(image[:2000]).decode()},
        "error_no_image": {"prompts": ["gear"], "image_base64": base64.b64encode(b"no image").decode()},
        "error_field": {"prompts": ["gear"], "treshold": 0.5},
    }
    answers = {}
    with service(session) as (ask, server):
        for name, request in segment.items():
            answers[name] = ask("POST", "/v1/segment", json.dumps({**encoded, **fields, "masks": "rle", **request}))
        answers["error_json"] = ask("POST", "/v1/segment", '{"prompts": ["gear"')
        answers["upload"] = ask("POST", "/v1/images", json.dumps(encoded))
        uploaded = {"image_id": answers["upload"]["body"].get("image_id")}
        again = {**fields, **uploaded, "prompts": ["gear"], "adapter": "parts"}
        answers["uploaded"] = ask("POST", "/v1/segment", json.dumps(again))
        for path in ("/v1/adapters", "/healthz", "/readyz", "/no-such-path"):
            answers[path] = ask("GET", path, None)
    yield "http", {"answers": answers, "processes_left": server["left"]}


@contextlib.contextmanager
def service(session: Session) -> Iterator[tuple[Callable[..., dict[str, Any]], dict[str, int]]]:
    """A running service: how to ask it, and, when it has been stopped, how many of its processes did not end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = session.work / "serve.yaml"
    settings.write_text(json.dumps({"torch_threads": 1}))  # JSON is YAML
    words = ["--model", "tiny", "--adapters", session.inputs / "adapters", "--port", str(port), "--config", settings]
    command = session.command("serve", *words)
    log = (session.work / "serve.log").open("w+")
    process = psutil.Popen(command, cwd=session.root, env=session.environment, stdout=log, stderr=log)

    def ask(method: str, path: str, body: str | None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return {"status": answer.status, "body": json.loads(answer.read() or "null")}
        finally:
            connection.close()

    found: dict[str, int] = {}
    try:
        wait_until_ready(process, ask, log)
        yield ask, found
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(90)
        found["left"] = end([*started, process])
        log.close()


def wait_until_ready(process: psutil.Popen, ask: Callable[..., dict[str, Any]], log: Any) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            if ask("GET", "/readyz", None)["status"] == 200:
                return
        time.sleep(0.5)
    log.seek(0)
    raise SystemExit(f"the service did not start:\n{log.read()[-3000:]}")


def end(processes: list[psutil.Process]) -> int:
    """Wait for processes to end, then kill those that did not; returns how many."""
    _, left = psutil.wait_procs(processes, timeout=30)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return len(left)


def record_tune(session: Session) -> Iterator[tuple[str, Any]]:
    """Three trials of a random search and the held-out comparison."""
    folder, space = session.work / "tune", session.work / "space.yaml"
    space.write_text(json.dumps(SPACE))  # JSON is YAML
    session.run("tune", space, "--data-dir", session.inputs / "drawn", "--output-dir", folder, *CPU)
    trials = [read(path) for path in sorted(folder.glob("trials/*/trial.json"))]
    yield "tune", {"trials": trials, "sweep": read(folder / "sweep.json")}


RECORDERS = {
    "train": record_train,
    "validate": record_validate,
    "compare": record_compare,
    "infer": record_infer,
    "predict": record_predict,
    "http": record_http,
    "tune": record_tune,
}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def by_image(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """COCO results by image and category: one detection more or less moves those of its own group only."""
    groups = defaultdict(list)
    for result in results:
        groups[f"image {result['image_id']} category {result['category_id']}"].append(result)
    return groups


def make(options: argparse.Namespace) -> int:
    options.root, options.out = options.root.resolve(), options.out.resolve()
    options.inputs = (options.inputs or options.out.parent / "inputs").resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="golden-"))  # kept if something fails
    session = Session(options, work)
    make_inputs(session, options.real_data)
    about = options.out / ABOUT
    parts = read(about) if about.is_file() else {}
    for name in options.only or RECORDERS:
        started = time.monotonic()
        session.commands.clear()
        session.environment["SAM3LORA_CACHE"] = str(work / f"cache_{name}")  # says how much was cached: begin empty
        for file_name, value in RECORDERS[name](session):
            write(options.out / f"{file_name}.json", session.clean(value))
        seconds = round(time.monotonic() - started)
        print(f"{name}: {seconds} s", flush=True)
        parts[name] = {"seconds": seconds, "commands": [*session.commands], "extra": options.extra}
        write(about, parts)
    shutil.rmtree(work)
    return 0


def differences(a: Any, b: Any, tolerance: float, path: str = "") -> Iterator[tuple[str, str]]:
    """Where two JSON values differ, and how."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    if numbers:
        if not math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance):
            yield path, f"{a!r} -> {b!r} ({b - a:+.3g})"
    elif type(a) is not type(b):
        yield path, f"{short(a)} -> {short(b)}"
    elif isinstance(a, dict):
        if a != b and {*a} == {*b} == {"size", "counts"}:
            yield path, f"mask: {mask_difference(a, b)}"
            return
        for key in sorted({*a, *b}):
            where = f"{path}.{key}" if re.fullmatch(r"\w+", key) else f"{path}[{key!r}]"
            if key not in b:
                yield where, f"only in the first: {short(a[key])}"
            elif key not in a:
                yield where, f"only in the second: {short(b[key])}"
            else:
                yield from differences(a[key], b[key], tolerance, where)
    elif isinstance(a, list):
        if len(a) != len(b):
            yield path, f"{len(a)} -> {len(b)} entries"
        for number, pair in enumerate(zip(a, b, strict=False)):
            yield from differences(*pair, tolerance, f"{path}[{number}]")
    elif a != b:
        yield path, f"{short(a)} -> {short(b)}"


def mask_difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    from pycocotools import mask

    if a["size"] != b["size"]:
        return f"size {a['size']} -> {b['size']}"
    changed = int((mask.decode(a) != mask.decode(b)).sum())
    return f"{changed} pixels of {int(mask.area(a))} in the first differ"


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 150 else f"{text[:150]}..."


def diff(options: argparse.Namespace) -> int:
    names = [{path.name for path in folder.glob("*.json")} - {ABOUT} for folder in (options.first, options.second)]
    if not all(names):
        raise SystemExit("one of the folders holds no record")
    total = 0
    for name in sorted(names[0] | names[1]):
        if name not in names[0] & names[1]:
            found = [("", f"only in the {'first' if name in names[0] else 'second'} folder")]
        else:
            first, second = read(options.first / name), read(options.second / name)
            found = list(differences(first, second, options.tolerance))
        if options.ignore:
            found = [entry for entry in found if not re.search(options.ignore, f"{name}{entry[0]}")]
        for path, what in found:
            print(f"{name}{path}: {what}")
        total += len(found)
    files = len(names[0] | names[1])
    print(f"{total} differences in {files} files" if total else f"no difference in {files} files")
    return int(total > 0)


def named_words(text: str) -> tuple[str, str]:
    name, equals, words = text.partition("=")
    if not equals or name not in {*RECORDERS, "serve", "segment"} - {"http"}:
        raise argparse.ArgumentTypeError(f"expected COMMAND=WORDS, such as infer='--nms box', got {text}")
    return name, words


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    maker = commands.add_parser("make", help="run the product and record what it says")
    maker.add_argument("--root", type=Path, required=True, help="checkout of the repository to run")
    maker.add_argument("--out", type=Path, required=True, help="folder of the record")
    maker.add_argument("--inputs", type=Path, help="folder of the inputs, made if missing (default: OUT/../inputs)")
    maker.add_argument("--real-data", type=Path, help="COCO folder with valid/ to copy into the inputs when made")
    maker.add_argument("--only", choices=RECORDERS, nargs="+", help="record these only")
    extra = "words to add to a command: infer='--nms box'; for requests over HTTP fields: segment='{\"nms\": \"box\"}'"
    maker.add_argument("--extra", type=named_words, action="append", default=[], metavar="COMMAND=WORDS", help=extra)
    maker.set_defaults(run=make)
    differ = commands.add_parser("diff", help="compare two records; exit status 1 if they differ")
    differ.add_argument("first", type=Path)
    differ.add_argument("second", type=Path)
    differ.add_argument("--tolerance", type=float, default=1e-6, help="of numbers: relative, absolute below 1")
    differ.add_argument("--ignore", help="regular expression of places to leave out, such as 'notes|message'")
    differ.set_defaults(run=diff)
    options = parser.parse_args()
    if hasattr(options, "extra"):
        options.extra = dict(options.extra)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
