"""Checking a COCO data set: the report and its tables."""
