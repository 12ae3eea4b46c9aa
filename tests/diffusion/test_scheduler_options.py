"""Every option of diffusers' schedulers: computed as there, or refused by name.

The network is exact for normal data, so nothing hides a difference between two samplers. A model's file names
the class; its sampler here is the one that the file describes.
"""

import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_sd.diffusion.denoiser import Denoiser, NoiseStreams
from keras_sd.diffusion.prediction import target
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.scheduler_options import OPTIONS, RULES_OF_CLASS, rule_of, unknown_keys
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.diffusion.spacing import training_sigmas
from keras_sd.errors import UserError
from tests.diffusion.scheduler_cases import VALUES, WITHOUT_EFFECT, sets_of, table_of_options
from tests.diffusion.toys import SEEDS, SHAPE, last
from tests.reference import run_reference

BAR = 1e-4
MEAN, DEVIATION = 0.5, 1.0
MOST_TIMESTEPS = 1000
FEW_STEPS = (2, 3, 4)
FEW_STEPS_OF = {"PNDMScheduler": "skip_prk_steps=True"}  # 4 and more without
ETA = {"DDIMScheduler": 0.5, "TCDScheduler": 0.3}

# Where diffusers has no answer, or none to be had: (class, what is set) -> why. All else has to agree.
ON_PURPOSE = {
    # Sigma is beyond 20,000 at the last timestep, and the mean of the noise there and one step on is far off.
    ("HeunDiscreteScheduler", "beta_schedule=squaredcos_cap_v2, prediction_type=v_prediction"),
    ("KDPM2DiscreteScheduler", "beta_schedule=squaredcos_cap_v2, prediction_type=v_prediction"),
    ("KDPM2AncestralDiscreteScheduler", "beta_schedule=squaredcos_cap_v2, prediction_type=v_prediction"),
}

DIFFUSERS = """
    import importlib
    import inspect
    import json
    import pkgutil
    import types

    import numpy

    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))  # noise comes from here
    import diffusers
    from diffusers import schedulers

    diffusers.logging.set_verbosity_error()
    cases = json.loads((folder / "cases.json").read_text())
    class_names = sorted({case[1] for case in cases})

    def classes():
        for module in pkgutil.iter_modules(schedulers.__path__):
            if module.name.startswith("scheduling_") and "flax" not in module.name:
                imported = importlib.import_module(f"diffusers.schedulers.{module.name}")
                yield from ((name, getattr(imported, name)) for name in class_names if name in vars(imported))

    found = {}
    for name, scheduler in classes():
        if scheduler.__module__.startswith("diffusers.schedulers.scheduling"):
            found.setdefault(name, scheduler)
    signatures = {
        name: {
            parameter.name: parameter.default
            for parameter in inspect.signature(scheduler.__init__).parameters.values()
            if parameter.name != "self"
        }
        for name, scheduler in found.items()
    }

    class Noise:
        '''As increments of one Brownian motion in sigma, a step in two parts.'''

        def __init__(self, *arguments):
            self.before = None

        def __call__(self, start, end):
            start, end = float(start), float(end)
            random = next(draws)
            if self.before is None:
                self.before = (end, random)
                return random
            middle, first = self.before
            self.before = None
            share = (start - middle) / (start - end)
            return share**0.5 * first + (1 - share) ** 0.5 * random

    def predict(kind, seen, timestep, log_sigmas):
        place = float(timestep)
        below = min(int(place), len(log_sigmas) - 2)
        low, high = log_sigmas[below], log_sigmas[below + 1]
        sigma = torch.exp(low + (place - below) * (high - low))
        signal, rate = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
        gain = inputs["deviation"] ** 2 * signal / (inputs["deviation"] ** 2 * signal**2 + rate**2)
        sample = inputs["mean"] + gain * (seen - signal * inputs["mean"])
        noise = (seen - signal * sample) / rate
        return {"epsilon": noise, "v_prediction": signal * noise - rate * sample}.get(kind, sample)

    # In double precision, as rounding to single is not what is compared.
    single = numpy.float32, torch.float32
    numpy.float32, torch.float32 = numpy.float64, torch.float64

    failures = {}
    for name, class_name, config, num_inference_steps, eta in cases:
        draws = iter(inputs["random"].double())
        module = sys.modules[found[class_name].__module__]
        module.randn_tensor = lambda shape, **options: next(draws)
        module.BrownianTreeNoiseSampler = Noise
        try:
            scheduler = found[class_name].from_config(config)
            scheduler.set_timesteps(num_inference_steps)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            latents = inputs["noise"].double() * scheduler.init_noise_sigma
            options = {"eta": eta} if eta else {}
            kind = config.get("prediction_type", "epsilon")
            for timestep in scheduler.timesteps:
                seen = scheduler.scale_model_input(latents, timestep)
                prediction = predict(kind, seen, timestep, inputs[f"table {name}"])
                latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
            outputs[name] = latents.double()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    numpy.float32, torch.float32 = single
    told = {"failures": failures, "signatures": signatures}
    (folder / "told.json").write_text(json.dumps(told, default=str))
"""


class GaussianUNet(keras.layers.Layer):
    """What a perfect network predicts of normal data, on the noise schedule that its variable holds."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.log_sigmas = self.add_weight(shape=(MOST_TIMESTEPS,), initializer="zeros", name="log_sigmas")

    def call(self, inputs):
        latents, timesteps = inputs
        below = ops.minimum(ops.cast(timesteps, "int32"), MOST_TIMESTEPS - 2)
        share = timesteps - ops.cast(below, "float32")
        low, high = ops.take(self.log_sigmas, below), ops.take(self.log_sigmas, below + 1)
        sigma = ops.reshape(ops.exp(low + share * (high - low)), (-1, 1, 1, 1))
        signal_rate, noise_rate = 1 / ops.sqrt(1 + sigma**2), sigma / ops.sqrt(1 + sigma**2)
        gain = DEVIATION**2 * signal_rate / (DEVIATION**2 * signal_rate**2 + noise_rate**2)
        sample = MEAN + gain * (latents - signal_rate * MEAN)
        noise = (latents - signal_rate * sample) / noise_rate
        return target(self.kind, sample, noise, signal_rate, noise_rate)


def num_steps_of(class_name, title=None):
    """A number below that from which on orders are not lowered at the end, and one above; few by default."""
    few = FEW_STEPS if title == FEW_STEPS_OF.get(class_name, "(defaults)") else ()
    return (*few, 9, 20) if "solver_order" in OPTIONS[class_name] else (*few, 10)


def all_cases():
    """(name, class, values, num_inference_steps, eta) of everything that is compared."""
    for class_name in OPTIONS:
        for title, values in sets_of(class_name).items():
            for num_inference_steps in num_steps_of(class_name, title):
                name = f"{class_name}/{title}/{num_inference_steps}"
                yield name, class_name, values, num_inference_steps, ETA.get(class_name, 0.0)


@pytest.fixture(scope="module")
def arrays():
    streams = NoiseStreams(SEEDS)
    noise = streams.draw(SHAPE)
    random = np.stack([streams.draw(SHAPE) for _ in range(40)])
    return {"noise": noise, "random": random}


@pytest.fixture(scope="module")
def made(arrays):
    """What the samplers here make: latents by case, and the errors of those that are refused."""
    denoisers, results, refused, tables = {}, {}, {}, {}
    for name, class_name, values, num_inference_steps, eta in all_cases():
        try:
            config = SchedulerConfig.from_dict({"_class_name": class_name} | values)
            schedule = NoiseSchedule(config)
        except UserError as error:
            refused[name] = str(error)
            continue
        kind = schedule.prediction_type
        if kind not in denoisers:
            denoisers[kind] = Denoiser(GaussianUNet(kind), schedule)
        denoiser = denoisers[kind]
        denoiser.schedule = schedule  # of which the compiled step uses the kind of prediction alone
        log_sigmas = np.log(training_sigmas(schedule)).astype("float32")
        padded = np.full(MOST_TIMESTEPS, log_sigmas[-1])
        padded[: len(log_sigmas)] = log_sigmas
        denoiser.unet.log_sigmas.assign(padded)
        tables[name] = padded
        streams = NoiseStreams(SEEDS)
        latents = streams.draw(SHAPE)
        try:
            results[name] = last(
                denoiser.steps(latents, num_inference_steps=num_inference_steps, eta=eta, streams=streams)
            )
        except UserError as error:
            refused[name] = str(error)
    return results, refused, tables


@pytest.fixture(scope="module")
def told(arrays, made, tmp_path_factory):
    """What diffusers makes: latents by case, errors by case, and the options of each class."""
    folder = tmp_path_factory.mktemp("options")
    _, _, tables = made
    cases = [case for case in all_cases() if case[0] in tables]
    (folder / "cases.json").write_text(json.dumps(cases))
    inputs = arrays | {f"table {name}": table.astype("float64") for name, table in tables.items()}
    inputs |= {"mean": np.array(MEAN), "deviation": np.array(DEVIATION)}
    latents = run_reference(DIFFUSERS, inputs, folder)
    return latents, *json.loads((folder / "told.json").read_text()).values()


def verdict_of(name, made, told):
    """What became of a case, and how far it is from diffusers."""
    results, refused, _ = made
    latents, failures, _ = told
    if name in refused:
        return "refused", None
    if name in failures or not np.isfinite(latents[name]).all():
        return "only here", None
    distance = np.abs(results[name] - latents[name]).max() / latents[name].std()
    return ("agrees" if distance < BAR else "differs"), distance


@pytest.mark.parametrize("class_name", OPTIONS)
def test_options_are_computed_as_in_diffusers_or_refused(class_name, made, told):
    far, counts = {}, {}
    for title in sets_of(class_name):
        names = [
            f"{class_name}/{title}/{num_inference_steps}"
            for num_inference_steps in num_steps_of(class_name, title)
        ]
        verdicts = [verdict_of(name, made, told) for name in names]
        kinds = {kind for kind, _ in verdicts}
        if (class_name, title) in ON_PURPOSE:
            assert kinds == {"differs"}, f"{title} no longer differs"
            kinds = {"on purpose"}
        far |= {name: v[1] for name, v in zip(names, verdicts, strict=True) if "differs" in kinds}
        counts[max(kinds)] = counts.get(max(kinds), 0) + 1
    print(class_name, counts)
    assert not {name: f"{distance:.2g}" for name, distance in far.items()}
    assert counts["agrees"] >= 10


def test_refusals_name_the_option_and_the_reason(made):
    _, refused, _ = made
    assert len(refused) > 30
    for name, line in refused.items():
        set_here = re.findall(r"(\w+)=", name)
        assert any(option in line for option in set_here), (name, line)
        assert "; use " in line and "\n" not in line


def test_every_option_matters_or_is_known_not_to(made, told):
    """A value that changes nothing would be compared in vain."""
    latents, _, _ = told
    idle = set()
    for class_name, known in OPTIONS.items():
        for option in known:
            if not _changes_something(class_name, option, latents, made):
                idle.add((class_name, option))
    expected = {
        (class_name, option)
        for class_name, known in OPTIONS.items()
        for option in known
        if (class_name, option) in WITHOUT_EFFECT
        or ((None, option) in WITHOUT_EFFECT and (class_name, option) not in RULES_OF_CLASS)
    }
    assert idle == expected


def _changes_something(class_name, option, latents, made):
    """Whether a value of an option is refused, or leads elsewhere than without it."""
    _, refused, _ = made
    values, others = VALUES[option]
    others = {name: value for name, value in others.items() if name in OPTIONS[class_name]}
    titles = {json.dumps(given, sort_keys=True): title for title, given in sets_of(class_name).items()}
    for value in values:
        results = []
        for given in ({option: value} | others, others):
            title = titles.get(json.dumps(sets_of(class_name)["(defaults)"] | given, sort_keys=True))
            names = [
                f"{class_name}/{title}/{num_inference_steps}"
                for num_inference_steps in num_steps_of(class_name)
            ]
            if names[0] in refused:
                return True
            results.append([latents.get(name) for name in names])
        if any(
            first is not None and (second is None or np.abs(first - second).max() > 1e-5)
            for first, second in zip(*results, strict=True)
        ):
            return True
    return False


def test_the_tables_know_every_option_of_diffusers(told):
    _, _, signatures = told
    assert signatures.keys() == OPTIONS.keys()
    for class_name, options in signatures.items():
        ours = json.loads(json.dumps(OPTIONS[class_name], default=str))
        assert ours == options, f"{class_name}: diffusers has other options or defaults"
        assert all(VALUES[option] and rule_of(class_name, option) for option in options)


def test_the_documentation_lists_every_option():
    text = (Path(__file__).parents[2] / "docs/samplers.md").read_text(encoding="utf-8")
    table = "\n".join(table_of_options())
    assert table in text, f"docs/samplers.md needs this table:\n{table}"


def test_keys_of_no_class_are_found():
    assert unknown_keys({"_class_name": "x", "clip_sample": True, "prk_order": 3}) == ["prk_order"]
