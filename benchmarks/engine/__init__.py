"""Parts of `cuda.py`: parity of two devices, their times, and what ONNX Runtime does on them."""
