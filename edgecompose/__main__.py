"""`python -m edgecompose`."""

from edgecompose.cli.main import main

if __name__ == "__main__":
    main()
