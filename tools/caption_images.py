"""Makes a data set out of a folder of images; the same as `keras-sd caption`."""

from keras_sd.cli.caption import caption
from keras_sd.cli.program import run_command

if __name__ == "__main__":
    run_command(caption, "caption_images.py")
