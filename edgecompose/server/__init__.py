"""A bundle behind HTTP, standard input or a batch file, in the form of the OpenAI API."""
