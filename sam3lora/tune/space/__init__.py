"""Search spaces: reading, parameters and rules."""
