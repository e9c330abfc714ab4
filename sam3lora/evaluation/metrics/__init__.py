"""Metrics as functions of plain data."""
