"""What to try next, from what was timed. Pure: no torch, no card."""
