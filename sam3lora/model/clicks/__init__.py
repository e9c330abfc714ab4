"""The click head: the tracker's half of a SAM 3 checkpoint, on the tokens of the detector's vision trunk."""
