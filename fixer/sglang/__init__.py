"""SGLang as it lies on disk: its releases, its tree, and its own functions."""
