"""Pure functions: tensors in, tensors out. No Lightning, no transformers, no state, no device choice."""
