"""SGLang's fused mixture-of-experts kernel: two products that share a routing."""
