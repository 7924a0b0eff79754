"""Conversations become tokens with labels: instruction data for a model that is to answer."""
