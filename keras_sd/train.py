"""`python -m keras_sd.train [METHOD] [OPTIONS]` trains; the methods are in `keras_sd.cli.train`."""

from keras_sd.__main__ import main

if __name__ == "__main__":
    main("keras_sd.cli.train.main")
