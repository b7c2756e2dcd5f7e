"""Build a ready-tuned image (`moefix bake`)."""
