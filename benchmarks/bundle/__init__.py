"""Parts of `storage.py`: LoRA factors, the coders and schemes that store them, and the divergence that they cause."""
