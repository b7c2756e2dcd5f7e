"""Choosing kernel configurations: what to try next, how to measure it, and what to keep."""
