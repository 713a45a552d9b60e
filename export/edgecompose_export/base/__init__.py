"""Exporting a base: opening it, choosing a precision, writing graphs and weights, measuring the distance."""
