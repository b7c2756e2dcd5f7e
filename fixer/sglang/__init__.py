"""What moefix reads of SGLang: releases, flags, tree, look-up, tuning files, log lines. Uses machine and base."""
