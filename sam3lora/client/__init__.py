"""Client of the HTTP service: `Client`, and `AsyncClient` for programs with an event loop.

Light on purpose: it needs httpx2, numpy, pycocotools and Pillow, and loads neither torch nor Ray.
"""

from sam3lora.client.clicking import ClickSession
from sam3lora.client.client import AsyncClient, Client
from sam3lora.client.dense_results import ClassResult, DenseLabels
from sam3lora.client.errors import (
    ConnectionFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    SegmentationError,
    ServerError,
    Timeout,
    Unauthorized,
)
from sam3lora.client.image_files import UploadedImage
from sam3lora.client.refine_results import RefinedMask, RefinedObject, RefineResults
from sam3lora.client.segment_results import AdapterInfo, PromptResult, SegmentResults

__all__ = [
    "AdapterInfo",
    "AsyncClient",
    "ClassResult",
    "ClickSession",
    "Client",
    "ConnectionFailed",
    "DenseLabels",
    "InvalidRequest",
    "NotFound",
    "Overloaded",
    "PromptResult",
    "RefineResults",
    "RefinedMask",
    "RefinedObject",
    "SegmentResults",
    "SegmentationError",
    "ServerError",
    "Timeout",
    "Unauthorized",
    "UploadedImage",
]
