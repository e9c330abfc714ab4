"""LoRA adapters: settings to layers, folders on disk, and the bank of several adapters on one model."""
