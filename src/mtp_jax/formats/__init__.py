"""Weights in the formats of other frameworks."""
