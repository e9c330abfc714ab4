"""How fast and how small the work is, beside the plain way of doing the same work in the same run."""
