"""Asks the user's own SGLang, without a server, weights or a card: which tuning file, which kernel, which shapes."""
