"""Clicks: one object shown by points, a box or a mask, and corrected by further points."""
