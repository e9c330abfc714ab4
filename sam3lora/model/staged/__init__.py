"""The forward pass of SAM 3 in stages, for training and inference."""
