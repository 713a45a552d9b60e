"""How often answers are right: examples, variants, results and their report."""
