"""The algebra of noise, velocity and sample predictions, for the loss and for every sampler.

A noisy sample is `signal_rate * sample + noise_rate * noise` with rates whose squares add to 1. A
network may predict the noise ("epsilon", Ho et al., 2020), the velocity
`signal_rate * noise - noise_rate * sample` ("v_prediction", Salimans and Ho, 2022) or the sample
("sample"). Rates broadcast against the samples; plain operators, so NumPy arrays work as well.
"""

import numpy as np


def add_noise(sample, noise, signal_rate, noise_rate):
    """Return the forward process."""
    return signal_rate * sample + noise_rate * noise


def target(kind, sample, noise, signal_rate, noise_rate):
    """What a network of prediction type `kind` should answer."""
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return signal_rate * noise - noise_rate * sample
    return sample


def to_sample_and_noise(kind, prediction, noisy, signal_rate, noise_rate):
    """Split a noisy sample into the predicted `(sample, noise)`."""
    if kind == "epsilon":
        return (noisy - noise_rate * prediction) / signal_rate, prediction
    if kind == "v_prediction":
        return signal_rate * noisy - noise_rate * prediction, noise_rate * noisy + signal_rate * prediction
    return prediction, (noisy - signal_rate * prediction) / noise_rate


def consistency_shares(timesteps, timestep_scaling=10.0, sigma_data=0.5):
    """What a consistency function takes of the noisy sample and of the predicted one.

    It has to give a sample without noise as it is, so at timestep 0 all is the former, and soon nearly all is
    the latter (Song et al., 2023, section 3, with the timesteps of Luo et al., 2023).

    Returns:
        `(share of the noisy sample, share of the predicted sample)`, of the shape of the timesteps.
    """
    scaled = timestep_scaling * timesteps
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    return skip, scaled / np.hypot(scaled, sigma_data)


def min_snr_weight(kind, signal_to_noise, gamma):
    """Loss weight that caps the pull of nearly clean timesteps (Hang et al., 2023).

    `signal_to_noise` is the ratio of squared rates. The weight on the squared error of the sample
    is min(SNR, gamma); divided here by what turns that error into the one of the prediction.
    """
    capped = np.minimum(signal_to_noise, gamma)
    if kind == "epsilon":
        return capped / signal_to_noise
    if kind == "v_prediction":
        return capped / (signal_to_noise + 1.0)
    return capped
