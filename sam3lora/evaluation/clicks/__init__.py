"""The standard protocol of interactive segmentation: simulated clicks, and how many an object takes."""
