"""A prompt to weights of tasks and adapters."""
