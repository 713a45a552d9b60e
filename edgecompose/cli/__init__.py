"""The command `edgecompose`."""
