"""Attacks as commands of the project: damaged files and requests, kills, and a soak."""
