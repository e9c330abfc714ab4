"""Values of a label map, uint8 (H, W): 0 is the background, classes count from 1."""

BACKGROUND = 0
IGNORE = 255
"""Label of pixels that nothing is asked of: they have no loss and no part in a metric."""
