"""The noise schedule of a training run: the model's, as options change it."""

import dataclasses

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError


def scheduler_of(model):
    """Return the noise schedule of a model's folder; the usual one for a single file, which has none."""
    path = model / "scheduler" / "scheduler_config.json"
    return SchedulerConfig.load(path) if path.is_file() else SchedulerConfig()


def chosen_schedule(scheduler_config, options):
    """Return a model's schedule as the options change it."""
    if options.get("prediction_type"):
        scheduler_config = dataclasses.replace(scheduler_config, prediction_type=options["prediction_type"])
    if options.get("rescale_betas_zero_snr"):
        return scheduler_config.with_zero_terminal_snr()
    return scheduler_config


def check_schedule(scheduler_config, options):
    scheduler_config = chosen_schedule(scheduler_config, options)
    if options.get("rescale_betas_zero_snr") and scheduler_config.prediction_type == "epsilon":
        remedy = (
            "give --prediction-type v_prediction" if "prediction_type" in options else "take another model"
        )
        raise UserError(
            "--rescale-betas-zero-snr: cannot be learned by a model that predicts epsilon, as its last "
            f"timestep is noise alone; {remedy}, or leave it out"
        )
    NoiseSchedule(scheduler_config).check_learnable()
    steps, most = options["num_inference_steps"], scheduler_config.num_train_timesteps
    if steps > most:
        raise UserError(f"--num-inference-steps {steps}: the model has {most} timesteps; give fewer")
