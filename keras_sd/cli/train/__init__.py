"""The training commands: one file for each method, and what they share."""
