"""The tokenizer of a base, read from a Hugging Face folder or a GGUF file."""
