"""The plain way to serve adapters: FastAPI around stock transformers and PEFT, one request at a time.

    python -m jobs.bench.plain_server --model FOLDER --adapters DIR --port P

What one would write in an hour: every adapter loaded at the start and switched by `set_adapter`, a lock around the
model, nothing kept between requests. Decoding and encoding are outside the lock. It takes and answers what the service
does, as far as the benchmark asks for it: a JPEG as the body, one prompt, `adapter` and `threshold` in the query.
"""

from __future__ import annotations

import argparse
import io
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from peft import PeftModel
from PIL import Image
from pycocotools import mask as coco_mask
from starlette.concurrency import run_in_threadpool
from torch import Tensor
from transformers import Sam3Model, Sam3Processor


class PlainSegmenter:
    """Stock model, processor and post-processing; each folder in `adapters` is an adapter, called by its name.

    It computes in float32 on a CPU and in bfloat16 on a GPU.
    """

    def __init__(self, model: str | Path, adapters: str | Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.processor = Sam3Processor.from_pretrained(model, local_files_only=True)
        base: Any = Sam3Model.from_pretrained(model, local_files_only=True, dtype=self.dtype)
        base = base.to(self.device)
        first, *others = sorted(folder for folder in Path(adapters).iterdir() if folder.is_dir())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks by the old name
            self.model = PeftModel.from_pretrained(base, first, adapter_name=first.name).eval()
        for folder in others:
            self.model.load_adapter(folder, adapter_name=folder.name)
        self._lock = threading.Lock()

    def segment(self, data: bytes, prompt: str, adapter: str, threshold: float) -> dict[str, Any]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        inputs = self.processor(images=image, text=prompt, return_tensors="pt")
        output = self._forward(inputs, adapter)
        found = self.processor.post_process_instance_segmentation(
            output, threshold=threshold, target_sizes=[(image.height, image.width)]
        )[0]
        detections = [
            {"score": score, "box_xyxy": box, "area_px": int(mask.sum()), "mask": _rle(mask)}
            for score, box, mask in zip(
                found["scores"].tolist(), found["boxes"].tolist(), found["masks"].bool().cpu().numpy(), strict=True
            )
        ]
        return {
            "image": {"width": image.width, "height": image.height},
            "adapter": adapter,
            "results": [{"prompt": prompt, "num_detections": len(detections), "detections": detections}],
        }

    def scores(self, data: bytes, prompt: str, adapter: str) -> Tensor:
        """Of all object queries, (Q,)."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        output = self._forward(self.processor(images=image, text=prompt, return_tensors="pt"), adapter)
        return (output.pred_logits.sigmoid() * output.presence_logits.sigmoid())[0].float().cpu()

    def _forward(self, inputs: Any, adapter: str) -> Any:
        inputs = inputs.to(self.device, self.dtype)  # its token ids keep their type
        with self._lock, torch.inference_mode():
            if self.model.active_adapter != adapter:
                self.model.set_adapter(adapter)
            output = self.model(**inputs)
        # post-processing computes quantities that bfloat16 is too coarse for
        for name in ("pred_logits", "presence_logits", "pred_boxes", "pred_masks"):
            setattr(output, name, getattr(output, name).float())
        return output


def create_app(segmenter: PlainSegmenter) -> FastAPI:
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> str:
        return "ready"

    @app.post("/v1/segment")
    async def segment(request: HttpRequest, prompts: str, adapter: str, threshold: float = 0.5) -> dict[str, Any]:
        return await run_in_threadpool(segmenter.segment, await request.body(), prompts, adapter, threshold)

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    app = create_app(PlainSegmenter(options.model, options.adapters, options.device))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


def _rle(mask_HW: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


if __name__ == "__main__":
    main()
