"""From flags to a running server whose log proves that it took the files."""
