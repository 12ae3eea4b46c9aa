"""A model as one object: its parts, the primitives on them, and the tasks built from primitives."""
