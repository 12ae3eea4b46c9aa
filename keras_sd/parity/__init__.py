"""Parity reports: compares a written model with its source, by tensors and by the outputs of its parts."""
