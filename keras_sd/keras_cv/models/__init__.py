"""The models of KerasCV that are here: Stable Diffusion and its parts."""

from keras_sd.keras_cv.models import stable_diffusion as stable_diffusion
from keras_sd.keras_cv.models.stable_diffusion.stable_diffusion import (
    StableDiffusion as StableDiffusion,
)
from keras_sd.keras_cv.models.stable_diffusion.stable_diffusion import (
    StableDiffusionV2 as StableDiffusionV2,
)
