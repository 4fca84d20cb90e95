"""`python -m pipeline <command>`, and the command `decant`."""

import os
import signal


def _leave(number: int, frame: object) -> None:
    """Nothing has begun yet: no traceback through half an import."""
    os.write(2, b"\ninterrupted before anything was begun\n")
    os._exit(128 + number)


def main() -> None:
    """Run a command; a Ctrl-C in the first second, while libraries are loaded, ends it at once."""
    before = {number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM)}
    from pipeline import cli

    for number, handler in before.items():
        signal.signal(number, handler)
    cli.main()


if __name__ == "__main__":
    main()
