"""The model replica: batching, adapters in slots, mask encoding."""
