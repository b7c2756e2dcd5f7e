"""Time kernels and layers on the card, in a process of its own."""
