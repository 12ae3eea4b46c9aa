"""Fréchet Inception Distance (FID): the distance between two sets of images, in a feature space.

Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to
a Local Nash Equilibrium", NeurIPS 2017, equation 6: the Fréchet distance of two normal distributions with the
features' means and covariances. It is biased: fewer images give a larger value, so only sets of the same size
compare, and other weights of the extractor give other values.
"""

import warnings

import numpy as np
import numpy.typing as npt

from keras_sd.errors import UserError
from keras_sd.metrics.kid import checked_features


def frechet_inception_distance(real_features: npt.ArrayLike, generated_features: npt.ArrayLike) -> float:
    """Return the FID of two sets of features, (n, d) and (m, d), computed in float64.

    A warning tells if a set has no more rows than features: then its covariance is singular, and the value
    far too large.

    Raises:
        UserError: a set has fewer than two rows, the widths differ, or a number is not finite.
    """
    real, generated = checked_features(real_features, generated_features, "FID")
    smallest, width = min(len(real), len(generated)), real.shape[1]
    if smallest < 2:
        raise UserError(f"FID of {len(real)} real and {len(generated)} generated images: give two or more")
    if smallest <= width:
        warnings.warn(
            f"FID of {smallest} images with {width} features: the covariance is singular and the value too "
            f"large; measure more than {width} images, or look at KID",
            stacklevel=2,
        )
    apart = real.mean(axis=0) - generated.mean(axis=0)
    roots = [_root(rows) for rows in (real, generated)]
    # The trace of (S1 S2)^(1/2), where S = R^T R: the singular values of R1 R2^T are its eigenvalues, and
    # they are not negative, as those of a matrix square root may be by rounding.
    mixed = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(apart @ apart + sum((root**2).sum() for root in roots) - 2 * mixed)


def _root(rows):
    """Return R with R^T R the covariance of the rows, `(at most d, d)`."""
    centred = (rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1)
    return np.linalg.qr(centred, mode="r")


def name_of(kid_name: str) -> str:
    """Return the name of an FID over the features of a KID."""
    return kid_name.replace("kid", "fid", 1)
