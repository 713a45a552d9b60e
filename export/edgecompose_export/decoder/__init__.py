"""What a decoder is: its configuration, read from Hugging Face or GGUF files and written for transformers."""
