"""A tuning as one HTML page, and as its short form for a terminal."""
