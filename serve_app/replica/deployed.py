"""The deployment's class, which Ray Serve imports by its name in the process of a replica."""

from sam3lora.heavy_imports import heavy_imports

with heavy_imports():
    from serve_app.replica.replica import ModelReplica

__all__ = ["ModelReplica"]
