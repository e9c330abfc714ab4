"""The deployment's class, which Ray Serve imports by its name in the process of a replica."""

from sam3lora.garbage_collection import importing_for_good
from sam3lora.start_marks import mark

mark("process of the replica")
with importing_for_good():
    from serve_app.replica.replica import ModelReplica

__all__ = ["ModelReplica"]
