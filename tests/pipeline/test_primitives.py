"""The pipeline: its promises about seeds and batches, its folder, and diffusers reading that folder."""

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd import StableDiffusion, presets
from keras_sd.config import TextEncoderConfig, UNetConfig
from keras_sd.diffusion.denoiser import NoiseStreams
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.files.image_files import parse_parameters, read_parameters, save_png
from keras_sd.models.batches import batches_of_lengths, equal_batches
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.pipeline.defaults import ModelDefaults
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.programs import run_python
from tests.reference import run_reference

# As the emoji model.
SCHEDULER = SchedulerConfig(
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
)
PROMPTS = ["red heart", "woman running"]
OPTIONS = {"num_inference_steps": 5, "guidance_scale": 3.0, "progress": False}
PARTS = ("text_encoder", "unet", "vae", "image_encoder")

DIFFUSERS = """
    from diffusers import StableDiffusionPipeline

    def generate(path, group, **options):
        pipeline = StableDiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        options |= dict(num_inference_steps=20, latents=inputs[group + "/noise"].permute(0, 3, 1, 2))
        outputs[group + "/latents"] = pipeline(**options, output_type="latent").images.permute(0, 2, 3, 1)
        outputs[group + "/images"] = torch.from_numpy(pipeline(**options, output_type="np").images)

    prompts = ["red heart"] * 2 + ["woman running"] * 2
    negatives = ["blue heart"] * 2 + ["flag of Japan"] * 2
    generate(folder / "model", "tiny", prompt=prompts, negative_prompt=negatives, guidance_scale=3.0)
    emoji = (folder / "emoji.txt").read_text()
    generate(emoji, "emoji", prompt=["red heart", "cat face"], guidance_scale=5.0)
"""

OTHER_BACKEND = """if True:
    import sys
    from safetensors.numpy import load_file, save_file
    import keras
    from keras_sd import StableDiffusion, presets

    folder = sys.argv[1]
    inputs = load_file(folder + "/inputs.safetensors")
    latents = StableDiffusion.load(folder + "/model").denoise(
        inputs["noise"], inputs["context"], inputs["negative"], num_inference_steps=20, guidance_scale=3.0
    )
    save_file({"latents": latents}, folder + "/outputs.safetensors")
    print(keras.backend.backend())
"""


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline(SCHEDULER, batch_size=4, jit_compile=False)


@pytest.fixture(scope="module")
def images(pipeline):
    return pipeline.text_to_image(PROMPTS, num_images=2, seed=3, **OPTIONS)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save(folder / "model")
    return folder


@pytest.fixture(scope="module")
def denoised(pipeline):
    """Noise, text encodings and what 20 guided steps make of them."""
    noise = NoiseStreams(range(4)).draw((4, 4, 4))
    context = pipeline.encode_text(PROMPTS).repeat(2, axis=0)
    negative = pipeline.encode_text(["blue heart", "flag of Japan"]).repeat(2, axis=0)
    latents = pipeline.denoise(noise, context, negative, num_inference_steps=20, guidance_scale=3.0)
    return {"noise": noise, "context": context, "negative": negative, "latents": latents}


def levels_apart(first, second):
    assert first.shape == second.shape and first.dtype == second.dtype == np.uint8
    return np.abs(first.astype(int) - second.astype(int)).max()


def test_same_seed_same_bytes(pipeline, images):
    assert images.shape == (4, 16, 16, 3) and images.dtype == np.uint8
    assert images.std() > 10
    again = pipeline.text_to_image(PROMPTS, num_images=2, seed=3, **OPTIONS)
    assert again.tobytes() == images.tobytes()
    other = pipeline.text_to_image(PROMPTS, num_images=2, seed=4, **OPTIONS)
    assert levels_apart(other, images) > 10
    # Image i is drawn from seed + i: the first prompt's second image moved to the front.
    assert levels_apart(other[:1], images[1:2]) <= 1


def test_xla_makes_the_same(images):
    compiled = tiny.pipeline(SCHEDULER, batch_size=4)
    assert levels_apart(compiled.text_to_image(PROMPTS, num_images=2, seed=3, **OPTIONS), images) <= 1


def test_a_picture_is_the_same_alone_and_in_batches(pipeline, images):
    for index, prompt in ((1, PROMPTS[0]), (2, PROMPTS[1])):
        alone = pipeline.text_to_image(prompt, seed=3 + index, **OPTIONS)
        assert levels_apart(alone, images[index : index + 1]) <= 1
    pipeline.batch_size = 1
    try:
        split = pipeline.text_to_image(PROMPTS, num_images=2, seed=3, **OPTIONS)
    finally:
        pipeline.batch_size = 4
    assert levels_apart(split, images) <= 1


def test_batches_are_equal_and_complete():
    for count in range(1, 40):
        for limit in (1, 3, 8):
            batches = equal_batches(count, limit)
            assert len({len(batch) for batch in batches}) == 1 and len(batches[0]) <= limit
            assert len(batches) == -(-count // limit)
            assert np.concatenate(batches)[:count].tolist() == list(range(count))
            assert max(batches[-1]) == count - 1


def test_lengths_share_a_program_where_they_are_few():
    assert [tokens for _, tokens in batches_of_lengths([77, 154, 231], 2, 77)] == [462, 462]
    lengths = [77 * chunks for chunks in (5, 7, 5, 5, 9)]
    batches = batches_of_lengths(lengths, 2, 77)
    assert [(batch.tolist(), tokens // 77) for batch, tokens in batches] == [
        ([0, 2], 5),
        ([3, 3], 5),
        ([1], 7),
        ([4], 9),
    ]


def test_many_lengths_are_drawn_in_batches_of_their_own(pipeline):
    prompts = [" BREAK ".join(["red heart", "flag", "dark"] * count) for count in (1, 2, 3)] + [
        "a BREAK b " * 4
    ]
    options = {**OPTIONS, "num_inference_steps": 5}
    images = pipeline.text_to_image(prompts, num_images=2, seed=1, **options)
    for index, prompt in enumerate(prompts):
        alone = pipeline.text_to_image(prompt, num_images=2, seed=1 + 2 * index, **options)
        assert levels_apart(alone, images[2 * index : 2 * index + 2]) <= 1
    assert [len(each) // 12 for each in pipeline.encode_each(prompts)] == [3, 6, 9, 5]
    with pytest.raises(UserError, match="least common multiple is 1716 chunks"):
        pipeline.encode_text([" BREAK ".join("a" * count) for count in (11, 12, 13)])


def test_fresh_noise_follows_the_seed_too(pipeline, images):
    options = {**OPTIONS, "eta": 1.0}
    noisy = pipeline.text_to_image(PROMPTS, num_images=2, seed=3, **options)
    assert levels_apart(noisy, images) > 10
    again = pipeline.text_to_image(PROMPTS, num_images=2, seed=3, **options)
    assert again.tobytes() == noisy.tobytes()
    alone = pipeline.text_to_image(PROMPTS[1], seed=5, **options)
    assert levels_apart(alone, noisy[2:3]) <= 1


def test_prompts_and_guidance_count(pipeline, images):
    assert levels_apart(images[0], images[2]) > 10
    for change in ({"negative_prompt": PROMPTS[::-1]}, {"negative_prompt": "flag"}, {"guidance_scale": 8.0}):
        changed = pipeline.text_to_image(PROMPTS, num_images=2, seed=3, **(OPTIONS | change))
        assert levels_apart(changed, images) > 10


def test_another_size_needs_no_other_model(pipeline):
    shape = pipeline.latent_shape(height=20, width=28)  # odd, where the UNet halves them
    assert shape == (5, 7, 4)
    context = pipeline.encode_text(PROMPTS)
    latents = pipeline.denoise(
        NoiseStreams([0, 1]).draw(shape), context, num_inference_steps=1, guidance_scale=1
    )
    assert latents.shape == (2, 5, 7, 4) and np.isfinite(latents).all()


def test_progress_is_shown_or_handed_over(pipeline, capsys):
    options = OPTIONS | {"progress": True}
    pipeline.text_to_image(PROMPTS, num_images=2, **options)
    captured = capsys.readouterr()
    assert "5/5" in captured.err and not captured.out

    calls = []
    options["progress"] = lambda done, total, latents: calls.append((done, total, latents.shape))
    pipeline.text_to_image(PROMPTS, num_images=4, **options)  # two turns
    assert calls == [(step, 10, (4, 4, 4, 4)) for step in range(1, 11)]
    pipeline.text_to_image(PROMPTS, num_images=2, **OPTIONS)
    assert not capsys.readouterr().err


def test_primitives_make_the_task(pipeline, images):
    streams = NoiseStreams([3, 4, 5, 6])
    # Together, as the task does, or the last digits differ.
    context, negative = np.split(pipeline.encode_text([*PROMPTS, "", ""]), 2)
    assert context.shape == (2, 12, 16)
    latents = pipeline.denoise(
        streams.draw(pipeline.latent_shape()),
        context.repeat(2, axis=0),
        negative.repeat(2, axis=0),
        num_inference_steps=5,
        guidance_scale=3.0,
    )
    assert levels_apart(pipeline.decode(latents), images) == 0
    encoded = pipeline.encode_image(images)
    expected = pipeline.vae.encode(images / np.float32(127.5) - 1).mode() * 0.18215
    np.testing.assert_allclose(encoded, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_saved_folder_comes_back(pipeline, folder, tmp_path, dtype):
    pipeline.save(tmp_path / "half", dtype)
    loaded = StableDiffusion.load(tmp_path / "half")
    assert loaded.name == "half" and loaded.scheduler_config == SCHEDULER
    for part in PARTS:
        saved, read = getattr(pipeline, part), getattr(loaded, part)
        assert read.config == saved.config
        for first, second in zip(saved.weights, read.weights, strict=True):
            if dtype == "float32":
                np.testing.assert_array_equal(first, second)
            else:
                np.testing.assert_allclose(first, second, rtol=1e-2, atol=1e-6)
    assert loaded.clip_head.keys() == {"text_projection.weight", "logit_scale"}
    assert loaded.clip_head["logit_scale"] == 2.5 and loaded.clip_head["logit_scale"].shape == ()
    np.testing.assert_array_equal(loaded.tokenizer(PROMPTS), pipeline.tokenizer(PROMPTS))
    # Once rounded, nothing changes any more.
    loaded.save(tmp_path / "again", dtype)
    for path in (tmp_path / "half").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "half")).read_bytes()


def test_diffusers_opens_the_folder_and_makes_the_same(pipeline, folder, denoised):
    emoji = StableDiffusion.from_preset("emoji")
    noise = NoiseStreams([0, 1]).draw(emoji.latent_shape())
    (folder / "emoji.txt").write_text(str(presets.find("emoji")))
    inputs = {"tiny/noise": denoised["noise"], "emoji/noise": noise}
    reference = run_reference(DIFFUSERS, inputs, folder)

    context = emoji.encode_text(["red heart", "cat face"])
    negative = emoji.encode_text(["", ""])
    latents = emoji.denoise(noise, context, negative, num_inference_steps=20, guidance_scale=5.0)
    for group, ours, model in (("tiny", denoised["latents"], pipeline), ("emoji", latents, emoji)):
        expected = reference[f"{group}/latents"]
        assert np.abs(ours - expected).max() / expected.std() < 1e-3
        pixels = np.round(reference[f"{group}/images"] * 255).astype(int)
        assert np.abs(model.decode(ours).astype(int) - pixels).max() <= 1


def test_the_other_backend_makes_the_same(folder, denoised):
    other = "tensorflow" if keras.backend.backend() == "jax" else "jax"
    inputs = {name: denoised[name] for name in ("noise", "context", "negative")}
    save_file(inputs, folder / "inputs.safetensors")
    assert run_python(["-c", OTHER_BACKEND, folder], other).strip() == other
    expected = denoised["latents"]
    latents = load_file(folder / "outputs.safetensors")["latents"]
    assert np.abs(latents - expected).max() / expected.std() < 1e-3


def test_pictures_say_how_they_were_made(folder, pipeline, tmp_path):
    loaded = StableDiffusion.load(folder / "model")
    assert len(loaded.model_hash) == 10 and int(loaded.model_hash, 16) >= 0
    settings = {"num_inference_steps": 30, "guidance_scale": 5.0, "seed": 7, "size": (16, 24)}
    image = np.zeros((16, 24, 3), "uint8")
    save_png(image, tmp_path / "a.png", loaded.parameters("red heart", "blue", **settings))
    assert read_parameters(tmp_path / "a.png") == {
        "prompt": "red heart",
        "negative_prompt": "blue",
        "Steps": "30",
        "Sampler": "DDIM",
        "CFG scale": "5",
        "Seed": "7",
        "Size": "24x16",
        "Model hash": loaded.model_hash,
        "Model": "model",
    }
    unsaved = pipeline.parameters("red heart", **settings, eta=0.5)
    assert "Model hash" not in unsaved and "negative_prompt" not in unsaved and unsaved["Eta"] == "0.5"
    assert "Guidance interval" not in unsaved and "Reuse interval" not in unsaved
    sparing = pipeline.parameters("red heart", **settings, guidance_interval=(0, 0.75), reuse_interval=2)
    assert (sparing["Guidance interval"], sparing["Reuse interval"]) == ("0 to 0.75", 2)
    assert parse_parameters("just a prompt") == {"prompt": "just a prompt"}


@pytest.mark.parametrize(
    "change, line",
    [
        ({"sampler": "magic"}, "sampler 'magic': unknown; use one of ddim"),
        ({"num_images": 0}, "num_images 0: out of range"),
        ({"seed": -1}, "seed -1: out of range"),
        ({"seed": 1.5}, "seed 1.5: out of range; use a whole number from 0"),
        ({"num_inference_steps": 0}, "num_inference_steps 0: out of range"),
        ({"eta": 2}, "eta 2: out of range"),
        ({"height": 22}, "height 22: does not fit the model; use a multiple of 4"),
        ({"width": 0}, "width 0: out of range; use a whole number from 1"),
        ({"prompt": []}, "prompt: the list is empty"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 1 prompts"),
    ],
)
def test_bad_settings_end_in_one_line(pipeline, change, line):
    with pytest.raises(UserError, match=line) as caught:
        pipeline.text_to_image(**({"prompt": "red heart", "progress": False} | change))
    assert "\n" not in str(caught.value)


def test_bad_folders_end_in_one_line(pipeline, folder, tmp_path):
    for path, line in ((tmp_path, "no model_index.json there"), (tmp_path / "none", "no such model; give a")):
        with pytest.raises(UserError, match=line):
            StableDiffusion.load(path)
    with pytest.raises(UserError, match="dtype 'int4': unknown"):
        pipeline.save(tmp_path / "model", "int4")
    assert not (tmp_path / "model").exists()

    pipeline.save(tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors: truncated"):
        StableDiffusion.load(tmp_path / "model")
    tensors = torch_state(pipeline.unet)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:3]
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, weights)
    with pytest.raises(UserError, match=r"1 misshapen.*conv_in.weight is \(3, 4, 3, 3\), the model has"):
        StableDiffusion.load(tmp_path / "model")
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        StableDiffusion.load(tmp_path / "model")


def test_options_of_loading_are_honoured_or_refused(folder):
    model = StableDiffusion.load(
        folder / "model", name="x", defaults=ModelDefaults({"sampling": {"guidance_scale": 2}})
    )
    assert (model.name, model.defaults.sampling["guidance_scale"]) == ("x", 2)
    missing = folder / "none"  # options are checked before files
    for path, options, line in [
        (folder / "model", {"defaults": 1}, "defaults 1: of another type; give a "),
        (folder / "model", {"name": 5}, "name 5: of another type; give a str"),
        (missing, {"jit_compile": "no"}, "jit_compile 'no': no switch; give True or False"),
        (missing, {"partial": 1}, "partial 1: no switch; give True or False"),
        (missing, {"batch_size": 0}, "batch_size 0: out of range"),
        (missing, {"dtype": "float64"}, "dtype 'float64': unknown; use float32, float16 or bfloat16$"),
        (missing, {"dtype": ["float32"]}, r"dtype \['float32'\]: unknown"),
    ]:
        with pytest.raises(UserError, match=line) as caught:
            StableDiffusion.load(path, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="tokenizer"):
        StableDiffusion.load(missing, tokenizer=None)


def test_parts_that_do_not_fit_end_in_one_line(pipeline):
    def text_encoder(**change):
        return TextEncoder(TextEncoderConfig.from_dict(pipeline.text_encoder.config.to_dict() | change))

    def unet(**change):
        return UNet(UNetConfig.from_dict(pipeline.unet.config.to_dict() | change))

    parts = {
        "tokenizer": pipeline.tokenizer,
        "text_encoder": pipeline.text_encoder,
        "unet": pipeline.unet,
        "vae": pipeline.vae,
        "scheduler_config": SCHEDULER,
    }
    for change, line in [
        ({"tokenizer": tiny.tokenizer(max_length=13)}, "gives 13 tokens, the text encoder takes 12"),
        ({"text_encoder": text_encoder(vocab_size=500)}, "tokens, the text encoder 500"),
        ({"unet": unet(cross_attention_dim=12)}, "16 wide, the UNet takes 12"),
        ({"unet": unet(in_channels=8)}, "8 channels in and 4 out"),
        ({"unet": unet(out_channels=8)}, "4 channels in and 8 out"),
        ({"unet": None}, "unet None: of another type; give a UNet"),
        ({"scheduler_config": {}}, "config {}: of another type; give a keras_sd.SchedulerConfig"),
    ]:
        with pytest.raises(UserError, match=line):
            StableDiffusion(**(parts | change))
