"""Metrics of dense prediction, one label or one probability for every pixel, as functions of plain data.

Every metric takes one image at a time, merges with what another worker counted, and keeps a small row per image, from
which the bootstrap draws.
"""
