"""The `k5` command. Ctrl-C and SIGTERM end it in one line also while PyTorch is imported, which takes seconds."""

import os
import signal


def _stop(number: int, frame: object) -> None:
    """Nothing is open yet. As an exception, an import might take it for its own."""
    os.write(2, f"k5: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def main() -> None:
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    from k5kernels.cli import app

    for number, handler in before.items():
        signal.signal(number, handler)
    app(prog_name="k5")
