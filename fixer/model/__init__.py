"""The named model: its config, the hub, its weights, and what SGLang makes of it. Uses sglang."""
