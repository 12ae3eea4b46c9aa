"""Opening the model of a training run again, from the run's options and the config of its checkpoint.

This module imports a backend.
"""

import dataclasses
import json
from pathlib import Path

from keras import ops

from keras_sd import config, presets
from keras_sd.cli.train.clip import new_text_encoder
from keras_sd.cli.train.data_options import configured_source, reading_of
from keras_sd.cli.train.fine_tuning import trained_parts
from keras_sd.cli.train.lora import low_rank_identity, open_with_loras
from keras_sd.cli.train.lora_ranks import RANKS
from keras_sd.cli.train.opening import open_pipeline
from keras_sd.cli.train.run import Run
from keras_sd.data.sources import load_source
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.tokenizer import vector_names
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.pipeline.upscaler import Upscaler
from keras_sd.training.autoencoder import measure_scale
from keras_sd.training.autoencoder_objective import AutoencoderObjective
from keras_sd.training.contrastive import save_clip
from keras_sd.training.lora import save_lora
from keras_sd.training.lora_metadata import METADATA
from keras_sd.training.objectives import ContrastiveObjective, DiffusionObjective
from keras_sd.training.pixel_ddim import save_model
from keras_sd.training.settings import Settings
from keras_sd.training.textual_inversion import initial_vectors, save_embedding
from keras_sd.weights.diffusers_folder import write_part
from keras_sd.weights.loading import load_clip, load_part
from keras_sd.weights.rules import torch_state, weights_fingerprint


def rebuild(method, options, identity):
    """Open the model of a run again, as it was before training.

    Args:
        method, options: of the run's command, from `run.json`.
        identity: config of a checkpoint.

    Returns:
        The objective that was trained, and `write(folder)`, which writes the model as the run does.

    Raises:
        UserError: options, base model and checkpoint do not belong together.
    """
    _check_same(identity, {"method": method})
    return _METHODS[method](options, identity)


def _check_same(identity, values):
    """Raise UserError if values of the options differ from those that the checkpoint records."""
    for name, value in values.items():
        if identity.get(name, value) != value:
            raise _mismatch(name, identity[name], value)


def _mismatch(name, recorded, given):
    return UserError(
        f"run.json: {name} is {json.dumps(given)}, but the checkpoint was trained with "
        f"{json.dumps(recorded)}; resume the run from it, which writes run.json anew"
    )


def _check_config(identity, name, rebuilt):
    """Raise UserError if the config of a network or a schedule differs from the recorded one."""
    if name in identity and type(rebuilt).from_dict(identity[name]) != rebuilt:
        raise UserError(
            f"run.json: gives another {name} than the checkpoint was trained with; bring back the base model "
            "and the options of the run"
        )


def _run(options):
    name = options["pretrained_model_name_or_path"]
    return Run(Settings("unused", train_batch_size=1), None, None, presets.find(name), options)


def _check_base(pipeline, options, identity):
    """Raise UserError unless the opened pipeline is the one that the run started from."""
    for part in ("vae", "text_encoder", "unet"):
        if identity.get(part) is not None and weights_fingerprint(getattr(pipeline, part)) != identity[part]:
            raise UserError(
                f"{options['pretrained_model_name_or_path']}: its {part} is not the one that the run has "
                "begun with; bring back the base model"
            )
    _check_same(identity, {key: options[key] for key in ("seed", "train_text_encoder") if key in options})
    _check_config(identity, "model", pipeline.unet.config)
    _check_config(identity, "schedule", pipeline.scheduler_config)


def _diffusion_objective(pipeline):
    schedule = NoiseSchedule(pipeline.scheduler_config)
    return DiffusionObjective(pipeline.unet, schedule, text_encoder=pipeline.text_encoder)


def _whole(options, identity, adapt=None):
    pipeline = open_pipeline(_run(options), adapt)
    _check_base(pipeline, options, identity)
    return _diffusion_objective(pipeline), pipeline.save


def _text_to_image(options, identity):
    def replace_unet(parts):
        parts["unet"] = UNet(config.UNetConfig.from_dict(identity["model"]))

    return _whole(options, identity, replace_unet if options["from_scratch"] else None)


def _low_rank(options, identity, trained):
    if "rank" not in identity:
        raise _mismatch("rank", None, options["rank"])
    options = type(options)({**options, "lora_weights": None})  # the checkpoint has what became of them
    if options.get("dim_from_weights"):  # not the command's
        options = type(options)({**options, **{name: identity.get(name) for name in RANKS}})
    _check_same(identity, low_rank_identity(options, trained))
    pipeline, _ = open_with_loras(_run(options), trained)
    _check_base(pipeline, options, identity)
    models = {name: getattr(pipeline, name) for name in trained}
    written = Path(options["output_dir"]) / METADATA  # older runs have none
    metadata = read_json(written, dict[str, str]) if written.is_file() else None
    return _diffusion_objective(pipeline), lambda folder: save_lora(folder, models, metadata)


def _lora(options, identity):
    return _low_rank(options, identity, trained_parts(options))


def _lcm(options, identity):
    return _low_rank(options, identity, ("unet",))


def _dreambooth(options, identity):
    return (_lora if options["lora"] else _whole)(options, identity)


def _textual_inversion(options, identity):
    token, count = options["placeholder_token"], options["num_vectors"]
    _check_same(identity, {"tokens": vector_names(token, count)})
    pipeline = open_pipeline(_run(options))
    _check_base(pipeline, options, identity)
    pipeline.add_tokens({token: initial_vectors(pipeline, count)})
    learned = pipeline.text_encoder.embeddings.learned_embedding.embeddings
    objective = _diffusion_objective(pipeline)
    return objective, lambda folder: save_embedding(folder, token, ops.convert_to_numpy(learned))


def _vae(options, identity):
    _check_same(identity, {"decoder_only": options["decoder_only"]})
    vae_config = config.VAEConfig.from_dict(identity["model"])
    if options["pretrained_vae"]:  # a checkpoint of the decoder alone lacks the other weights
        vae = load_part(presets.find(options["pretrained_vae"]), "vae", "float32")
    else:
        vae = AutoencoderKL(vae_config)

    def write(folder):
        written = vae_config
        if not options["decoder_only"]:
            side = identity.get("framing", {}).get("resolution", vae_config.sample_size)
            source = _source(options, side, need_captions=False)
            written = dataclasses.replace(vae_config, scaling_factor=measure_scale(vae, source))
        write_part(folder, "vae", written.to_dict(), torch_state(vae))

    return AutoencoderObjective(vae), write


def _source(options, image_size, need_captions):
    """Return the training images of the run, from which a part of its model is computed."""
    if options.get("dataset_config"):
        return configured_source(options, need_captions).at_size(image_size)
    folder = options["train_data_dir"]
    place = Path(folder) if folder else options["dataset_name"] or "emoji"
    return load_source(place, "train", image_size, need_captions, **reading_of(options))


def _clip(options, identity):
    image_config = config.ImageEncoderConfig.from_dict(identity["image_model"])
    if options["frozen_text_encoder"]:
        parts = load_clip(presets.find(options["frozen_text_encoder"]))
        tokenizer, text_encoder = parts["tokenizer"], parts["text_encoder"]
    else:
        tokens = options["tokenizer_folder"]
        source = None if tokens else _source(options, image_config.image_size, need_captions=True)
        tokenizer, text_encoder = new_text_encoder(options["text_config"], tokens, source)
    _check_config(identity, "text_model", text_encoder.config)
    objective = ContrastiveObjective(text_encoder, ImageEncoder(image_config))
    return objective, lambda folder: save_clip(folder, objective, tokenizer)


def _ddim(options, identity):
    unet = UNet(config.UNetConfig.from_dict(identity["model"]))
    scheduler = _schedule(identity, "schedule")
    objective = DiffusionObjective(unet, NoiseSchedule(scheduler))
    return objective, lambda folder: save_model(folder, unet, scheduler)


def _super_resolution(options, identity):
    unet = UNet(config.UNetConfig.from_dict(identity["model"]))
    schedules = [_schedule(identity, name) for name in ("schedule", "low_res_schedule")]
    return DiffusionObjective(unet, NoiseSchedule(schedules[0])), Upscaler(unet, *schedules).save


def _schedule(identity, name):
    """Return the config of a schedule that comes from no file."""
    return dataclasses.replace(SchedulerConfig.from_dict(identity[name]), published=None)


_METHODS = {
    "text-to-image": _text_to_image,
    "lora": _lora,
    "lcm": _lcm,
    "dreambooth": _dreambooth,
    "textual-inversion": _textual_inversion,
    "vae": _vae,
    "clip": _clip,
    "ddim": _ddim,
    "super-resolution": _super_resolution,
}
