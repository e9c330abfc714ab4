"""Converting labelled data sets of other tools to COCO folders, and back.

Each format has a module with its reader and, where we write it, its writer. They share
`sam3lora.data.convert.labelled_set.LabelledSet`.
"""

from __future__ import annotations

from sam3lora.data.convert.run import SOURCE_FORMATS, TARGET_FORMATS, ConversionReport, convert_folder

__all__ = ["SOURCE_FORMATS", "TARGET_FORMATS", "ConversionReport", "convert_folder"]
