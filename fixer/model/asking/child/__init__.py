"""What runs inside SGLang's own interpreter: the standard library, torch, Triton and SGLang, nothing of moefix.

It is loaded under another name there (`ask.py`, `_BOOT`), so its modules import each other relatively.
"""
