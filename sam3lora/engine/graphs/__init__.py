"""Inference as captured graphs: each stage of the model starts on a GPU as one launch instead of hundreds."""
