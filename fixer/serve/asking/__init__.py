"""Ask a started SGLang which file it looks for."""
