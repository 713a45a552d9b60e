"""Adapters and weights to a blend on the device."""
