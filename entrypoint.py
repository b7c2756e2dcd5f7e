"""Process 1 of moefix's image, and the way to run a checkout: `python entrypoint.py --model ...`."""

import signal
import sys

if __name__ == "__main__":
    # The kernel drops SIGTERM for a process 1 that handles none, and importing takes a while on a slow disk.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    from fixer.cli import main

    main()
