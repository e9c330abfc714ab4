"""Reports of evaluations: HTML pages, charts, pictures, saved files."""
