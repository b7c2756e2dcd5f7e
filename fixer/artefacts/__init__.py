"""A finished tuning: value, shelf, check, installation, export."""
