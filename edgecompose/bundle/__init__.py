"""A bundle at rest: its manifest, its files, its adapters as quantised arrays."""
