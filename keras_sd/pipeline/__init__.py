"""A model as one object: its parts opened and saved, the primitives on them, and the tasks."""
