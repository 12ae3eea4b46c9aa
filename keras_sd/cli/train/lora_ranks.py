"""Ranks and alphas of the LoRA file that a run begins from, in place of those on the command line."""

import click

from keras_sd.cli.command import refuse_unused
from keras_sd.errors import UserError
from keras_sd.files.json_files import parse_json

RANKS = ("rank", "lora_alpha", "conv_rank", "conv_alpha")
"""Names of the options that a file replaces."""

ranks_of_file_option = click.option(
    "--dim-from-weights",
    is_flag=True,
    help="Take --rank, --lora-alpha, --conv-rank and --conv-alpha from the file of --lora-weights, and from "
    "the header of a file of keras-sd those by block.",
)


def take_ranks_of_file(options):
    """Set the ranks and alphas of a run to those of its file, if `dim_from_weights` says so.

    Raises:
        UserError: there is no file, it has updates of several ranks that its header does not explain, or a
            rank is given, too.
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
    from keras_sd.weights.lora_arithmetic import read_products

    file = read_products(options["lora_weights"])
    if _take_from_header(options, file):
        return
    windows = {name: update for name, update in file.updates.items() if update.shape[2:] not in ((), (1, 1))}
    others = [update for name, update in file.updates.items() if name not in windows]
    options["rank"], options["lora_alpha"] = _only(others or windows.values(), options)
    # Convolutions of residual blocks have the usual rank with `--lora-layers all`; those between have none.
    if windows and (options.get("lora_layers") != "all" or any(map(_is_between_levels, windows))):
        options["conv_rank"], options["conv_alpha"] = _only(windows.values(), options)


def _take_from_header(options, file):
    """Take all ranks from the header of a file that has ranks by block; return whether it has."""
    metadata = file.metadata
    try:
        arguments = parse_json(metadata.get("ss_network_args", "{}"), "ss_network_args", dict)
        blocks = {
            name: " ".join(f"{block}={number}" for block, number in arguments[name].items())
            for name in ("rank_by_block", "alpha_by_block")
            if name in arguments
        }
        if not blocks:
            return False
        rank, alpha = int(metadata["ss_network_dim"]), float(metadata["ss_network_alpha"])
        found = {"rank": rank, "lora_alpha": alpha, **blocks}
        if "conv_dim" in arguments:
            found |= {"conv_rank": int(arguments["conv_dim"]), "conv_alpha": float(arguments["conv_alpha"])}
    except (UserError, ValueError, TypeError, AttributeError, KeyError):  # a header of another program
        return False
    if all(_rank(update) in (None, update.alpha) for update in file.updates.values()):
        found["lora_alpha"] = None  # each alpha is the rank of its block, as by default
    options.update(found)
    return True


def _only(updates, options):
    """Return the rank and the alpha that all updates have."""
    found = sorted({(rank, float(update.alpha)) for update in updates if (rank := _rank(update)) is not None})
    if not found:
        raise UserError(
            f"--dim-from-weights: {options['lora_weights']} has whole matrices, which have no rank; "
            "give --rank, one that is large enough"
        )
    if len(found) > 1:
        listed = ", ".join(f"{rank} (alpha {alpha:g})" for rank, alpha in found)
        raise UserError(
            f"--dim-from-weights: {options['lora_weights']} has layers of ranks {listed}; give --rank and "
            "--rank-by-block, --lora-alpha and --alpha-by-block"
        )
    return found[0]


def _rank(update):
    """Return the rank of an update; None of a Kronecker product of whole matrices."""
    if hasattr(update, "down"):
        return len(update.down)
    return update.rank if hasattr(update, "rank") else len(update.first[1])


def _is_between_levels(name):
    """Return whether kohya's name of a layer is that of a down- or upsampling convolution."""
    return (
        "samplers_" in name or name.endswith("_op") or ("_output_blocks_" in name and name.endswith("_conv"))
    )
