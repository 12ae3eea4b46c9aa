"""Ranks and alphas of the LoRA file that a run begins from, in place of those on the command line."""

import click

from keras_sd.cli.command import refuse_unused
from keras_sd.errors import UserError

RANKS = ("rank", "lora_alpha", "conv_rank", "conv_alpha")
"""Names of the options that a file replaces."""

ranks_of_file_option = click.option(
    "--dim-from-weights",
    is_flag=True,
    help="Take --rank, --lora-alpha, --conv-rank and --conv-alpha from the file of --lora-weights.",
)


def take_ranks_of_file(options):
    """Set the ranks and alphas of a run to those of its file, if `dim_from_weights` says so.

    Raises:
        UserError: there is no file, it has updates of several ranks or of another kind, or a rank is given,
            too.
    """
    if not options["dim_from_weights"]:
        return
    if not options["lora_weights"]:
        raise UserError("--dim-from-weights: no file is named; give --lora-weights, or leave it out")
    refuse_unused(
        (*RANKS, "rank_by_block", "alpha_by_block"),
        False,
        "with --dim-from-weights, which takes them from the file",
    )
    from keras_sd.weights.lora_arithmetic import read_plain_lora

    updates = read_plain_lora(options["lora_weights"]).updates
    windows = {name: update for name, update in updates.items() if update.down.shape[2:] not in ((), (1, 1))}
    others = [update for name, update in updates.items() if name not in windows]
    options["rank"], options["lora_alpha"] = _only(others or windows.values(), options)
    # Convolutions of residual blocks have the usual rank with `--lora-layers all`; those between have none.
    if windows and (options.get("lora_layers") != "all" or any(map(_is_between_levels, windows))):
        options["conv_rank"], options["conv_alpha"] = _only(windows.values(), options)


def _only(updates, options):
    """Return the rank and the alpha that all updates have."""
    found = sorted({(len(update.down), float(update.alpha)) for update in updates})
    if len(found) > 1:
        listed = ", ".join(f"{rank} (alpha {alpha:g})" for rank, alpha in found)
        raise UserError(
            f"--dim-from-weights: {options['lora_weights']} has layers of ranks {listed}; give --rank and "
            "--rank-by-block, --lora-alpha and --alpha-by-block"
        )
    return found[0]


def _is_between_levels(name):
    """Return whether kohya's name of a layer is that of a down- or upsampling convolution."""
    return (
        "samplers_" in name or name.endswith("_op") or ("_output_blocks_" in name and name.endswith("_conv"))
    )
