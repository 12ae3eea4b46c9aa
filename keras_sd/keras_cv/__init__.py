"""KerasCV's Stable Diffusion by its own names, so that a tutorial written for it runs here.

Change `import keras_cv` to `import keras_sd.keras_cv as keras_cv`, and `from keras_cv.models` to
`from keras_sd.keras_cv.models`. New code is better off with `keras_sd.StableDiffusion`, which has more tasks,
samplers and sizes.
"""

from keras_sd.keras_cv import models as models
