"""What a command shares with its shell and its terminal: signals, standard streams, errors, messages of a person."""
