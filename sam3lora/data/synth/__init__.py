"""Generated data sets with exact labels."""
