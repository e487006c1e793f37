"""Start the command line: the console script `nkat`, and `python -m nkat_ray`."""

import sys


def main() -> None:
    """Load the command line and run it; Ctrl-C while it is still being loaded is one line."""
    try:
        from nkat_ray import cli
    except KeyboardInterrupt:  # so early that `cli`, which ends in order, is not loaded yet
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
