"""``corec verify RUN``: compare the files of a run with the digests that its stages recorded."""

import argparse
import sys

from corec import CorecError, stages


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 if no file has changed."""
    parser = argparse.ArgumentParser(prog="corec", description="Look after the files of runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="compare the files of a run with the digests in its stage records")
    verify.add_argument("run", help="name of the run: a folder in runs/")
    given = parser.parse_args(arguments)
    try:
        faults = stages.verify(given.run)
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    for fault in faults:
        print(f"corec: {fault}.", file=sys.stderr)
    if not faults:
        print(f"run {given.run!r}: all files are as their stages wrote them")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
