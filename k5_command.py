"""The `k5` command, and what ends it and every other program here in one line while PyTorch is imported.

That takes seconds, in which Ctrl-C or SIGTERM would end in a traceback. It stands beside the packages, as importing one
of them imports PyTorch.
"""

import os
import signal
import sys
from collections.abc import Callable


def stop_in_one_line(program: str, end: Callable[[int], object] = sys.exit) -> None:
    """From now on Ctrl-C and SIGTERM end the program with a line on stderr and exit code 128 + the signal's number,
    where nothing else sees to them. end: takes the code; `sys.exit` raises SystemExit, so that what is open is closed.
    """

    def stop(number: int, frame: object) -> None:
        os.write(2, f"{program}: stopped by {signal.Signals(number).name}\n".encode())
        end(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def stop_imports_in_one_line(program: str) -> None:
    """The same where a package, which calls this first of all, is imported as `python -m` runs a module of it: until
    then, Python has put `-m` in the place of the module's path. Of packages that import one another the first one does.
    """
    seen_to = getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__
    if sys.argv[:1] == ["-m"] and not seen_to:
        # Nothing is open yet, and an import might take an exception for its own.
        stop_in_one_line(program, os._exit)


def main() -> None:
    stop_in_one_line("k5", os._exit)
    from k5kernels.cli import main

    main()
