"""LoRA adapters: folders, weights, target modules, PEFT layers for training, and the bank for inference."""
