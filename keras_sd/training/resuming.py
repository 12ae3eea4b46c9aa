"""Adapts a checkpoint to the run that resumes it, which may have other settings."""

import warnings

from keras_sd.errors import UserError
from keras_sd.training import post_hoc_ema
from keras_sd.training.settings import MAY_CHANGE

_SUMS = "gradients/"  # prefix of gradient sums over the batches since the last update


def fit_state(path, checkpoint, state, optimizer, inner_optimizer, settings):
    """Give the groups of a checkpoint and of a run's state the same names; check that they fit.

    The optimizer's variables get names that do not depend on gradient accumulation. Gradient sums of another
    accumulation are dropped: they are zero between two updates, except after float16 batches that overflowed.

    Args:
        path: path of the checkpoint, for messages.
        checkpoint: `checkpoints.TrainingState`; its groups are changed in place.
        state: dictionary of group -> name -> variable; changed in place.
        optimizer: the compiled optimizer; in float16 it scales the loss and wraps `inner_optimizer`.
        inner_optimizer: the optimizer without loss scaling.
        settings: `Settings` of the run.

    Raises:
        UserError: names or shapes differ.
    """
    saved = checkpoint.groups
    averages = [group for group in state if group.startswith(post_hoc_ema.PREFIX)]
    check_averages(path, saved, averages)
    if not averages and any(group.startswith(post_hoc_ema.PREFIX) for group in saved):
        warnings.warn(f"{path}: its averages for `post_hoc_ema` are not kept on", stacklevel=2)
    for group in ("weights", "ema", *averages):
        _check_same(f"{path}: {group}", saved.get(group, {}), state[group])
    before = _before(checkpoint, settings)["gradient_accumulation_steps"]
    now = settings.gradient_accumulation_steps
    scaling = len(optimizer.variables) - len(inner_optimizer.variables)
    tensors = list(saved.get("optimizer", {}).values())
    kinds = inner_optimizer.state_names
    names = _optimizer_names(scaling, kinds, len(state["weights"]), before > 1)
    if len(tensors) != len(names):
        raise UserError(_misfit(f"{path}: optimizer", f"{len(tensors)} tensors and not {len(names)}"))
    theirs = dict(zip(names, tensors, strict=True))
    names = _optimizer_names(scaling, kinds, len(state["weights"]), now > 1)
    own = dict(zip(names, state["optimizer"].values(), strict=True))
    if before != now:
        theirs, own = (
            {name: value for name, value in group.items() if not name.startswith(_SUMS)}
            for group in (theirs, own)
        )
        theirs["iterations"] = theirs["iterations"] // before * now  # Keras counts batches
    _check_same(f"{path}: optimizer", theirs, own)
    saved["optimizer"], state["optimizer"] = theirs, own


def check_averages(path, saved, averages):
    """Raise UserError if a checkpoint lacks averages that the run is to keep.

    Args:
        path: path of the checkpoint.
        saved: the names of its groups.
        averages: the names of the groups of averages.
    """
    if any(group not in saved for group in averages):
        raise UserError(
            f"{path}: has no averages for `post_hoc_ema`, which have to be kept from the first step; leave "
            "it out, or begin anew"
        )


def _optimizer_names(scaling, kinds, trained, accumulates):
    """Return the names of an optimizer's variables in Keras' order.

    Args:
        scaling: number of variables for loss scaling.
        kinds: the names of the optimizer's own state, such as moments.
        trained: number of trained variables.
        accumulates: whether gradients are accumulated over several batches.
    """
    return [
        *(f"loss scale/{index}" for index in range(scaling)),
        "iterations",
        *(f"{_SUMS}{index}" for index in range(trained if accumulates else 0)),
        *kinds,
    ]


def _check_same(place, saved, variables):
    """Raise UserError unless both have the same names and shapes."""
    lacking, surplus = variables.keys() - saved.keys(), saved.keys() - variables.keys()
    if lacking or surplus:
        fault = f"lacks {min(lacking)}" if lacking else f"has {min(surplus)}, which is not trained here"
        raise UserError(_misfit(place, fault))
    for name, variable in variables.items():
        if tuple(saved[name].shape) != tuple(variable.shape):
            there, here = (list(array.shape) for array in (saved[name], variable))
            raise UserError(_misfit(place, f"{name} is {there} there and {here} here"))


def _misfit(place, fault):
    return (
        f"{place} does not fit this run ({fault}); resume with the same model, LoRA layers and rank, or "
        "choose another `output_dir`"
    )


def _before(checkpoint, settings):
    """Return the checkpoint's values of the settings that may change."""
    return {name: checkpoint.config.get(name, getattr(settings, name)) for name in MAY_CHANGE}


def _examples(checkpoint, settings):
    """Return how many examples the run has seen."""
    position = checkpoint.position
    if "examples" in position:
        return position["examples"]
    # Earlier versions stored only the number of batches.
    return position["batch"] * _before(checkpoint, settings)["train_batch_size"]


def first_batch(checkpoint, settings):
    """Return the number of the batch to resume with, in batches of the current size."""
    return -(-_examples(checkpoint, settings) // settings.train_batch_size)


def describe(checkpoint, settings):
    """Return one line: the step that the run continues from, the changed settings and what follows."""
    before = _before(checkpoint, settings)
    changed = {name: value for name, value in before.items() if value != getattr(settings, name)}
    if not changed:
        return f"resuming after step {checkpoint.step}"
    parts = [f"{name} is {getattr(settings, name)}, it was {value}" for name, value in changed.items()]
    if "max_train_steps" in changed and not settings.lr_scheduler.startswith("constant"):
        parts.append(f"the {settings.lr_scheduler} schedule of the learning rate ends at the new last step")
    if changed.keys() & {"train_batch_size", "gradient_accumulation_steps"}:
        size = settings.train_batch_size * settings.gradient_accumulation_steps
        seen = _examples(checkpoint, settings)
        parts.append(f"updates are now of {size} images, and their order continues after the {seen} seen")
    return f"resuming after step {checkpoint.step} with changes: {'; '.join(parts)}"
