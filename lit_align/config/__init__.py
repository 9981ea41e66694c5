"""Configurations: read, checked and explained before anything slow is imported or any class is built."""
