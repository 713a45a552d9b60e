"""What runs on the device: sessions, memory, the decoder and its KV cache, a blend bound to it."""
