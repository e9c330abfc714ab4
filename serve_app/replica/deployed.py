"""The deployment's class, which Ray Serve imports by its name in the process of a replica."""

from sam3lora.garbage_collection import no_garbage_collection
from sam3lora.start_marks import mark

mark("process of the replica")
with no_garbage_collection():
    from serve_app.replica.replica import ModelReplica

__all__ = ["ModelReplica"]
