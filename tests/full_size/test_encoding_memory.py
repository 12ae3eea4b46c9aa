"""The memory that encoding images with Stable Diffusion's own autoencoder takes, on the CPU in float32."""

import os
import subprocess
import sys

import pytest

# The peak comes with the second batch, when the third is read; more images only take longer.
IMAGES = 12
BAR = 6.0  # GiB above what is in use once the model is open

PROGRAM = f"""if True:
    import numpy as np
    from keras_sd.config import VAEConfig
    from keras_sd.models.vae import AutoencoderKL
    from keras_sd.training.encodings import EncodedSource
    from tests import tiny

    class Noise:
        def __len__(self):
            return {IMAGES}

        def __getitem__(self, index):
            pixels = np.random.default_rng(index).integers(0, 256, (512, 512, 3), "uint8")
            return {{"image": pixels, "captions": ("noise",)}}

    def gibibytes(name):
        return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) / 2**20

    vae = AutoencoderKL(VAEConfig())
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = gibibytes("VmRSS")
    encoded = EncodedSource(Noise(), vae, None, tiny.tokenizer())
    assert len(encoded) == {IMAGES} and encoded[0]["mean"].shape == (64, 64, 4)
    print(gibibytes("VmHWM") - before)
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_peak_memory_of_encoding(backend):
    environment = os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) < BAR
