"""Setting of the run folder."""

from __future__ import annotations

from pydantic import Field

from ._section import Section


class OutputSection(Section):
    """The run folder."""

    output_dir: str = Field(
        default="outputs/run",
        min_length=1,
        description="Folder of the run; when it is not set, outputs/<name of the preset or file>.",
    )
