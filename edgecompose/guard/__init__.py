"""What stands between files, programs and libraries of others and the rest."""
