"""Drawn data sets with exact labels."""
