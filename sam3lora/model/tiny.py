"""The built-in tiny SAM 3: its name and the folder with its files.

It has the architecture of ``facebook/sam3`` in small, at 224 pixels instead of 1008. ``jobs/pretrain_tiny.py`` trained
it from random weights on generated scenes.
"""

from __future__ import annotations

from pathlib import Path

TINY = "tiny"
TINY_FOLDER = Path(__file__).parent / "assets" / "tiny"
