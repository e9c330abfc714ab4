"""Splitting a COCO data set without leakage."""
