"""Evaluation: asking models about a split, metrics, and reports. `sam3lora.evaluate` is in `evaluation.ask.run`."""
