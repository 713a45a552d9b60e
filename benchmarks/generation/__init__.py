"""Parts of `speed.py`: a bundle's latency, its rates beside llama.cpp's, the server under load, and the table."""
