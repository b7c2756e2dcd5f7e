"""Part of the image's build: the versions that its labels state are those that are installed.

`check_labels.py moefix=0.1.0 sglang=0.5.17 triton=3.6.0`
"""

import importlib.metadata
import sys

for label in sys.argv[1:]:
    package, _, version = label.partition("=")
    if (found := importlib.metadata.version(package)) != version:
        sys.exit(f"check_labels: {package} {found} is installed, and the label says {version}")
