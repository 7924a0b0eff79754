"""Measuring a model on text it has not seen, and deciding whether it passes."""
