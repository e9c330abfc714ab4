"""The SAM 3 model: loading, LoRA adapters, the staged forward pass, export, and the built-in tiny model."""
