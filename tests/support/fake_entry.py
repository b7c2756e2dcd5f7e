"""entrypoint.py with a card that is not there (`fakes.stand_in`); its flags are entrypoint.py's."""

import runpy
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as entrypoint.py does, a little later
    from tests.support import fakes

    fakes.stand_in()
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "entrypoint.py"), run_name="__main__")
