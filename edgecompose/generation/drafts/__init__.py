"""Guesses of the next tokens, which a pass of the model verifies: an answer is the same with and without them."""
