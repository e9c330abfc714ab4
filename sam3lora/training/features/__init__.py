"""Features of the frozen vision trunk, kept in memory and on disk."""
