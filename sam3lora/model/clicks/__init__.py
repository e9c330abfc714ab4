"""The click head: the tracker's half of a SAM 3 checkpoint, on the tokens of the detector's vision trunk."""

MASK_LIMIT = 32.0
"""Largest absolute logit of a mask that is given as a prompt."""
