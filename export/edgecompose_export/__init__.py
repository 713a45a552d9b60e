"""Build time of EdgeCompose: exports bases, embedders, adapters and examples, trains adapters, writes bundles."""

__version__ = "0.1.0"
