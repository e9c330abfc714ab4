"""Training of the built-in tiny SAM 3 from random weights: a scene bank, a vision stage, a joint stage, and its figures."""
