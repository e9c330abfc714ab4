"""SAM 3's forward in stages that training and inference combine."""
