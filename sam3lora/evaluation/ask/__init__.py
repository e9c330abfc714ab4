"""Asking models about every image of a split."""
