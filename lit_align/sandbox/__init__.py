"""The embedded world: a tiny language whose gold reward is known, reached by class_path as any world would be."""
