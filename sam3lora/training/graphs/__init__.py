"""Training in CUDA graphs."""
