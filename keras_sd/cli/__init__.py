"""The command line: `keras-sd` and its commands."""
