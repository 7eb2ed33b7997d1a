"""What the command `proximo` and `python -m proximo` run; it answers Ctrl-C while the rest is still being imported."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Import the command line and run it.

    An exception would not do here: libraries that are in the middle of being imported turn it into others.
    """
    if os.environ.get("NO_COLOR"):  # https://no-color.org; Rich knows it, Tyro does not
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # where it is ignored, as of a job in the background, it stays so
        signal.signal(signal.SIGINT, _interrupted)
    from proximo.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


def _interrupted(number: int, frame: object) -> None:
    del number, frame
    os.write(2, b"proximo: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
