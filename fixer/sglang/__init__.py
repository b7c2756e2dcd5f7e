"""What moefix knows of SGLang: what a tree declares, its flags, its files, its server."""
