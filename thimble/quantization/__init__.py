"""Weights in four or eight bits: GPTQ, the file format, and the ladder that ends at the gate."""
