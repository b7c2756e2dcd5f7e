"""The kernel families: what moefix can tune. Each one is a value behind one contract (`family.Family`)."""
