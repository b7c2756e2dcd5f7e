"""Process 1 of moefix's image, and the way to run a checkout: `python entrypoint.py --model ...`."""

from fixer.cli import main

if __name__ == "__main__":
    main()
