"""Splitting a COCO data set without leaks between the splits."""
