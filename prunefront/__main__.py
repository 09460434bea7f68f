"""``python -m prunefront`` is the `prunefront` command, for environments whose scripts are not on the path."""

from prunefront.cli import main

if __name__ == "__main__":
    main()
