"""The weights' download, in a process of its own."""
