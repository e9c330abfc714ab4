"""The deployment's class, which Ray Serve imports by its name in the process of a replica."""

from sam3lora.heavy_imports import heavy_imports
from sam3lora.start_marks import mark

mark("process of the replica")
with heavy_imports():
    from serve_app.replica.replica import ModelReplica

__all__ = ["ModelReplica"]
