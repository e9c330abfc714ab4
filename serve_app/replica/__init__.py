"""The model side of the service: batches, adapters in slots, masks."""
