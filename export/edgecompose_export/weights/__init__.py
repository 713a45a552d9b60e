"""The weights of a base: files, tensors, and the forms and blocks in which they are quantised."""
