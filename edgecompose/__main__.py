"""`python -m edgecompose`."""

from edgecompose.cli import main

if __name__ == "__main__":
    main()
