"""Adapters and models in the files of other programs, and the table of architectures."""
