"""Files, folders, limits, secrets and signals: what touches the world outside. Imports nothing else of lit_align."""
