"""Interactive sessions: objects of one image found by prompts, shown by clicks and boxes, and corrected."""
