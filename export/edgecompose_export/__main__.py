"""`python -m edgecompose_export`."""

from edgecompose_export.cli import main

if __name__ == "__main__":
    main()
