"""Training of dense prediction: a label for each pixel. The loop is that of every task."""
