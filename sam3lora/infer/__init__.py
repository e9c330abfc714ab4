"""Using adapters: drawing what was found."""
