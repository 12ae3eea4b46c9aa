"""Converts a model between formats, and compares the result with its source: `keras-sd convert` as a script.

python tools/convert_weights.py SOURCE OUTPUT --verify
"""

from keras_sd.cli.convert import convert
from keras_sd.cli.program import run_command

if __name__ == "__main__":
    run_command(convert, "convert_weights")
