"""moefix: tune SGLang's fused mixture-of-experts kernel for the card in the machine, and serve with it."""

__version__ = "0.1.0"
