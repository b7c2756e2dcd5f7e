"""Commands in modules of their own; fixer/cli.py lists them and says when they are imported."""
