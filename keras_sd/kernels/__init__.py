"""What only makes models fast or small; each has a plain reference beside it in a test."""
