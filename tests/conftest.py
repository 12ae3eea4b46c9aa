"""What every test shares: a quiet TensorFlow backend, unless the caller chose another."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
