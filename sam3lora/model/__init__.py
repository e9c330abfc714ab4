"""SAM 3 itself: loading, adapters, the staged forward, and the built-in tiny model."""
