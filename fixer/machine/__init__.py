"""This machine: cards, driver, signals, processes. Uses base."""
