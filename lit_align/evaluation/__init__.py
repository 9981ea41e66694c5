"""Measures of what alignment does to a model."""
