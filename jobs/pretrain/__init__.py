"""Training the built-in tiny SAM 3 from random weights: scene bank, vision stage, joint stage, figures."""
