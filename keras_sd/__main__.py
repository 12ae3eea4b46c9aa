"""`python -m keras_sd` is the command `keras-sd`."""

from keras_sd.cli import main

if __name__ == "__main__":
    main()
