"""A blend and a prompt to text."""
