"""Makes a data set out of a folder of pictures; the same as `keras-sd caption`."""

from keras_sd.caption import caption
from keras_sd.errors import run_command

if __name__ == "__main__":
    run_command(caption, "caption_images.py")
