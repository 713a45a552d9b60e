"""A bundle behind HTTP: connections, who may call, who has a turn, and how the server ends."""
