"""The objectives of an autoencoder: reconstruction error, perceptual distance and a discriminator."""

from typing import Any

import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.models.discriminator import PatchDiscriminator
from keras_sd.models.pixels import images_to_unit
from keras_sd.training.autoencoder_losses import AutoencoderLosses
from keras_sd.training.objectives import Objective
from keras_sd.training.perceptual import PerceptualDistance

_EPSILON = 1e-4  # of the adaptive weight, in Esser et al.'s equation 7 and code
_LARGEST_WEIGHT = 1e4


class AutoencoderObjective(Objective):
    """Reconstruction error of a KL autoencoder plus the divergence from the standard normal distribution.

    A batch holds uint8 `images` and `noise` of the latents' shape. Squared and absolute errors are means over
    the pixels of images in [-1, 1]; the divergence is in nats per latent element.

    Args:
        vae: the autoencoder.
        losses: `AutoencoderLosses`; None for their defaults.
        image_encoder: of the perceptual distance, frozen; None if its weight is 0.
    """

    def __init__(self, vae, losses=None, image_encoder=None, **kwargs: Any):
        super().__init__(**kwargs)
        self.vae = vae
        self.loss_weights = losses or AutoencoderLosses()
        self.image_encoder = image_encoder
        self.distance = PerceptualDistance(image_encoder) if self.loss_weights.perceptual_weight else None

    def call(self, batch):
        images = images_to_unit(batch["images"])
        posterior = self.vae.encode(images)
        outputs = self.vae.decode(posterior.sample(batch["noise"]))
        return self.reconstruction_loss(images, outputs) + self.divergence_loss(posterior)

    def reconstruction_loss(self, images, outputs):
        """Return the errors of the pixels, and the weighted perceptual distance, of each example: `(n,)`."""
        errors = outputs - images
        loss = ops.mean(ops.abs(errors) + 2.0 * ops.square(errors), axis=(1, 2, 3))
        if self.distance is not None:
            loss += self.loss_weights.perceptual_weight * self.distance(images, outputs)
        return loss

    def divergence_loss(self, posterior):
        """Return the weighted divergence of each example: `(n,)`."""
        latent_size = np.prod(posterior.mean.shape[1:])
        return self.loss_weights.kl_weight / latent_size * posterior.kl_divergence()


class AdversarialAutoencoderObjective(AutoencoderObjective):
    """The same against a patch discriminator, as Esser et al. (2021) train it, in one step for both.

    Both sides take one update from the same outputs. The discriminator has the hinge loss. The autoencoder's
    adversarial loss, the mean of the negative logits, has an adaptive weight (equation 7): the norm of the
    gradient of its other losses by the decoder's last kernel, over that of the adversarial loss.

    Esser, Rombach, Ommer, "Taming Transformers for High-Resolution Image Synthesis", 2021.
    """

    def __init__(self, vae, losses, image_encoder=None, **kwargs: Any):
        super().__init__(vae, losses, image_encoder, **kwargs)
        self.discriminator = PatchDiscriminator(losses.discriminator_width, losses.discriminator_depth)
        self.phase_starts = (losses.adversarial_start,) if losses.adversarial_start else ()
        self._fooling = backend.with_constant_variables(
            lambda outputs: -ops.mean(self.discriminator(outputs), axis=(1, 2, 3)),
            self.discriminator.variables,
        )

    def call(self, batch):
        """Return figures of the batch: the `loss` `(n,)`, the discriminator's, and the adaptive weight."""
        images = images_to_unit(batch["images"])
        posterior = self.vae.encode(images)
        features = self.vae.decode_features(posterior.sample(batch["noise"]))
        outputs = ops.cast(self.vae.decoder.conv_out(features), "float32")
        figures = {"discriminator_loss": self.discriminator_loss(images, ops.stop_gradient(outputs))}
        is_heard = self.phase == len(self.phase_starts)
        if not is_heard:
            figures["loss"] = self.reconstruction_loss(images, outputs) + self.divergence_loss(posterior)
            return figures
        value, gradient, weight = self._generator(images, outputs, features)
        figures["adversarial_weight"] = weight
        # The gradient by the outputs is known already; this term has no other effect than to pass it on.
        product = ops.sum(gradient * outputs)
        figures["loss"] = value + product - ops.stop_gradient(product) + self.divergence_loss(posterior)
        return figures

    def discriminator_loss(self, images, outputs):
        """Return the hinge loss of each example: `(n,)`."""
        real, made = self.discriminator(images), self.discriminator(outputs)
        return 0.5 * ops.mean(ops.relu(1.0 - real) + ops.relu(1.0 + made), axis=(1, 2, 3))

    def _generator(self, images, outputs, features):
        """Return the autoencoder's loss, its gradient by the outputs, and the weight of its second part."""
        reconstruction, by_pixels = backend.value_and_gradient(
            lambda made: ops.mean(self.reconstruction_loss(images, made)), outputs
        )
        adversarial, by_verdict = backend.value_and_gradient(
            lambda made: ops.mean(self._fooling(made)), outputs
        )
        norms = [self._kernel_norm(features, gradient) for gradient in (by_pixels, by_verdict)]
        weight = ops.clip(norms[0] / (norms[1] + _EPSILON), 0.0, _LARGEST_WEIGHT)
        weight *= self.loss_weights.adversarial_weight
        return reconstruction + weight * adversarial, by_pixels + weight * by_verdict, weight

    def _kernel_norm(self, features, gradient):
        """Return the norm of the gradient by the decoder's last kernel, from that by its outputs."""
        layer = self.vae.decoder.conv_out
        features = ops.cast(ops.stop_gradient(features), "float32")

        def product(kernel):
            return ops.sum(gradient * ops.conv(features, kernel, padding="same"))

        _, by_kernel = backend.value_and_gradient(product, ops.cast(layer.kernel, "float32"))
        return ops.sqrt(ops.sum(ops.square(by_kernel)))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(y_pred["loss"]) + ops.mean(y_pred["discriminator_loss"])
