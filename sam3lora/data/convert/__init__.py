"""Data sets of other tools to COCO folders, and back.

One file a direction and format (`read_yolo`, `write_yolo`, ...); all meet in `labelled_set.LabelledSet`.
"""

from __future__ import annotations

from sam3lora.data.convert.report import ConversionReport
from sam3lora.data.convert.run import SOURCE_FORMATS, TARGET_FORMATS, convert_folder

__all__ = ["SOURCE_FORMATS", "TARGET_FORMATS", "ConversionReport", "convert_folder"]
