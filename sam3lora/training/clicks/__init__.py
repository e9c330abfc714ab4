"""Training of the click head."""
