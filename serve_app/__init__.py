"""The Ray Serve application: many adapters over one copy of the base model."""
