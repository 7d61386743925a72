"""The command `kfo`, also `python -m kfo_ext`: Ctrl-C is one line even while its parser is being imported."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from kfo_ext.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("kfo: aborted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
