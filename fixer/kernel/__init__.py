"""Compile a kernel of SGLang for a card that need not be here, and read its shared memory. Uses sglang."""
