"""Small rules for E, N and number format, where SGLang itself cannot be asked."""
