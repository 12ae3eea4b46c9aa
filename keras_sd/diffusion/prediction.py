"""The algebra of noise, velocity and sample predictions, for the loss and for every sampler.

A noisy sample is `signal_rate * sample + noise_rate * noise` with rates whose squares add to 1. A
network may predict the noise ("epsilon", Ho et al., 2020), the velocity
`signal_rate * noise - noise_rate * sample` ("v_prediction", Salimans and Ho, 2022) or the sample
("sample"). Rates broadcast against the samples; plain operators, so NumPy arrays work as well.
"""

import numpy as np

from keras_sd.arguments import Tensor
from keras_sd.errors import UserError


def add_noise(sample: Tensor, noise: Tensor, signal_rate: Tensor, noise_rate: Tensor) -> Tensor:
    """Return the noisy sample of the forward process."""
    return signal_rate * sample + noise_rate * noise


def target(kind, sample, noise, signal_rate, noise_rate):
    """Return the training target of a network with prediction type `kind`."""
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return signal_rate * noise - noise_rate * sample
    return sample


def to_sample_and_noise(
    kind: str, prediction: Tensor, noisy: Tensor, signal_rate: Tensor, noise_rate: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the predicted `(sample, noise)` of a noisy sample, from a prediction of type `kind`."""
    if kind == "epsilon":
        return (noisy - noise_rate * prediction) / signal_rate, prediction
    if kind == "v_prediction":
        return signal_rate * noisy - noise_rate * prediction, noise_rate * noisy + signal_rate * prediction
    return prediction, (noisy - signal_rate * prediction) / noise_rate


def consistency_shares(timesteps, timestep_scaling=10.0, sigma_data=0.5):
    """Return the boundary-condition weights of a consistency function, `c_skip` and `c_out`.

    At timestep 0 the function must return its input, so `c_skip` is 1 there; it falls to nearly 0 soon after
    (Song et al., 2023, section 3, with the timesteps of Luo et al., 2023).

    Returns:
        (weight of the noisy sample, weight of the predicted sample), each of the shape of the timesteps.
    """
    scaled = timestep_scaling * timesteps
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    return skip, scaled / np.hypot(scaled, sigma_data)


def min_snr_weight(kind, signal_to_noise, gamma):
    """Return the min-SNR loss weight, which limits the weight of nearly clean timesteps (Hang et al., 2023).

    `signal_to_noise` is the ratio of the squared rates. The weight on the squared error of the sample is
    min(SNR, gamma). It is divided here by the factor between that error and the error of the prediction.
    """
    capped = np.minimum(signal_to_noise, gamma)
    if kind == "epsilon":
        return capped / signal_to_noise
    if kind == "v_prediction":
        return capped / (signal_to_noise + 1.0)
    return capped


def debiased_weight(kind, signal_to_noise):
    """Return the loss weight that balances the errors of all timesteps (Yu et al., 2023, equation 9).

    `signal_to_noise` is the ratio of the squared rates. The weight is 1 / sqrt(SNR) with an SNR of at most
    1,000, and 1 / (SNR + 1) for velocity, as trainers have it.

    Raises:
        UserError: the network predicts the sample, for which no such weight is in use.
    """
    capped = np.minimum(signal_to_noise, 1000.0)
    if kind == "epsilon":
        return 1.0 / np.sqrt(capped)
    if kind == "v_prediction":
        return 1.0 / (capped + 1.0)
    raise UserError(f"debiased_estimation: is not defined for prediction_type {kind}; leave it out")
