"""Panels of horizontal bars below each other, as one PNG."""

import contextlib

from keras_sd.files.writing import replaced


@contextlib.contextmanager
def saved_panels(path, bars, panel_inches, bar_inches):
    """Give the axes of panels with so many bars each; after the block they are written to a PNG file.

    Args:
        path: of the file.
        bars: the number of bars of each panel, to which its height is proportional.
        panel_inches, bar_inches: what a panel and a bar add to the height of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(bars),
        figsize=(8, panel_inches * len(bars) + bar_inches * sum(bars)),
        height_ratios=bars,
        squeeze=False,
        constrained_layout=True,
    )
    try:
        yield list(axes[:, 0])
        with replaced(path) as staging:
            figure.savefig(staging, dpi=110, format="png")
    finally:
        plt.close(figure)
