"""The tasks against diffusers' pipelines, on the same small models and the same noise."""

import dataclasses
import functools
import inspect
import warnings

import numpy as np
import pytest
from keras import ops

from keras_sd.diffusion.denoiser import Known, NoiseStreams
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from tests import tiny
from tests.reference import run_reference

SIZE = 24  # six latent positions, which the UNet halves once
OPTIONS = {"num_inference_steps": 20, "guidance_scale": 3.0, "progress": False}
LOW_RES_SCHEDULER = SchedulerConfig(beta_start=0.0001, beta_end=0.02, steps_offset=0)

REFERENCE = """
    import numpy as np
    from diffusers import (
        StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionUpscalePipeline
    )
    from diffusers.pipelines.stable_diffusion import (
        pipeline_stable_diffusion_img2img as img2img,
        pipeline_stable_diffusion_inpaint as inpaint,
        pipeline_stable_diffusion_upscale as upscale,
    )

    def queue(*names):
        arrays = [inputs[name].permute(0, 3, 1, 2) for name in names]
        return lambda *arguments, **options: arrays.pop(0)

    for module in (img2img, inpaint):
        module.retrieve_latents = lambda output, *_, **options: output.latent_dist.mode()

    prompts, negatives = ["red heart", "woman running"], ["blue heart"] * 2
    options = dict(
        prompt=prompts, negative_prompt=negatives, output_type="np",
        num_inference_steps=20, guidance_scale=3.0,
    )
    images = inputs["images"].permute(0, 3, 1, 2).float() / 255
    mask = inputs["mask"][None, None].float()

    def run(pipeline_class, name, **more):
        pipeline = pipeline_class.from_pretrained(folder / name, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return torch.from_numpy(pipeline(**options, **more).images)

    img2img.randn_tensor = queue("noise")
    outputs["image_to_image"] = run(
        StableDiffusionImg2ImgPipeline, "plain", image=images, strength=0.6
    )
    size = dict(height=images.shape[2], width=images.shape[3], mask_image=mask, image=images)
    inpaint.randn_tensor = queue("noise")
    outputs["inpaint"] = run(StableDiffusionInpaintPipeline, "plain", strength=1.0, **size)
    inpaint.randn_tensor = queue("noise")
    outputs["inpaint_part"] = run(StableDiffusionInpaintPipeline, "plain", strength=0.5, **size)
    inpaint.randn_tensor = queue("noise")
    outputs["inpaint_9"] = run(StableDiffusionInpaintPipeline, "inpainting", strength=1.0, **size)
    upscale.randn_tensor = queue("image_noise")
    outputs["upscale"] = run(
        StableDiffusionUpscalePipeline, "upscaler", image=inputs["images"].permute(0, 3, 1, 2) / 127.5 - 1,
        noise_level=20, latents=inputs["large_noise"].permute(0, 3, 1, 2),
    )
"""


@pytest.fixture(scope="module")
def plain():
    # Compiling by XLA, which other tests do, would take longer than all that is done here.
    return tiny.pipeline(SchedulerConfig(), jit_compile=False)


@pytest.fixture(scope="module")
def inpainting():
    unet = dataclasses.replace(tiny.SD1_UNET, in_channels=9)
    return tiny.pipeline(SchedulerConfig(), unet, jit_compile=False)


@pytest.fixture(scope="module")
def upscaler():
    config = dataclasses.replace(tiny.SD1_UNET, in_channels=7, num_class_embeds=1000)
    vae = dataclasses.replace(tiny.VAE, scaling_factor=0.08333)  # diffusers allows its upscaler no other
    options = {"low_res_scheduler_config": LOW_RES_SCHEDULER, "jit_compile": False}
    return tiny.pipeline(SchedulerConfig(), config, vae, **options)


@pytest.fixture(scope="module")
def pictures():
    """Two images with structure: smooth colours and a square."""
    ramp = np.linspace(0, 255, SIZE)
    images = np.stack(
        [
            np.stack(
                [ramp + 0 * ramp[:, None], ramp[:, None] + 0 * ramp, 0 * ramp[:, None] + 128 + 0 * ramp], -1
            )
        ]
        * 2
    )
    images[1, 5:12, 8:20] = (255, 40, 0)
    return images.astype("uint8")


@pytest.fixture(scope="module")
def mask():
    mask = np.zeros((SIZE, SIZE), "uint8")
    mask[:, SIZE // 2 :] = 255
    return mask


@pytest.fixture(scope="module")
def reference(plain, inpainting, upscaler, pictures, mask, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, model in {"plain": plain, "inpainting": inpainting, "upscaler": upscaler}.items():
        model.save(folder / name)
    large = NoiseStreams([0, 1])
    inputs = {
        "images": pictures,
        "mask": (mask >= 128).astype("float32"),
        "noise": NoiseStreams([0, 1]).draw(plain.latent_shape(SIZE, SIZE)),
        "large_noise": large.draw((SIZE, SIZE, 4)),
        "image_noise": large.draw((SIZE, SIZE, 3)),
    }
    return run_reference(REFERENCE, inputs, folder)


PROMPTS = {"prompt": ["red heart", "woman running"], "negative_prompt": "blue heart"}


def within_two_levels(images, expected):
    expected = np.round(expected * 255).astype(int)
    assert images.shape == expected.shape and images.dtype == np.uint8
    assert images.std() > 10
    return np.abs(images.astype(int) - expected).max() <= 2


def test_image_to_image_is_diffusers(plain, pictures, reference):
    images = plain.image_to_image(pictures, **PROMPTS, strength=0.6, **OPTIONS)
    assert within_two_levels(images, reference["image_to_image"])


def test_inpainting_is_diffusers_inside_and_the_picture_outside(plain, inpainting, pictures, mask, reference):
    for model, name, strength in (
        (plain, "inpaint", 1.0),
        (plain, "inpaint_part", 0.5),
        (inpainting, "inpaint_9", 1.0),
    ):
        images = model.inpaint(pictures, mask, **PROMPTS, strength=strength, **OPTIONS)
        inside = np.broadcast_to(mask[:, :, None] >= 128, images.shape)
        expected = np.where(inside, reference[name], pictures / np.float32(255))
        assert within_two_levels(images, expected)
        np.testing.assert_array_equal(images[~inside], pictures[~inside])


def test_upscaling_is_diffusers(upscaler, pictures, reference):
    images = upscaler.upscale(pictures, **PROMPTS, noise_level=20, **OPTIONS)
    assert images.shape == (2, 4 * SIZE, 4 * SIZE, 3)
    assert within_two_levels(images, reference["upscale"])


def test_strength_decides_how_much_is_kept(plain, pictures):
    def distance(strength):
        images = plain.image_to_image(
            pictures[0], "red heart", strength=strength, num_inference_steps=20, progress=False
        )
        return np.abs(images.astype(int) - plain.reconstruct(pictures[0])).mean()

    distances = [distance(strength) for strength in (0.05, 0.5, 1.0)]
    assert distances[0] < distances[1] < distances[2]


def test_a_walk_between_prompts_begins_and_ends_at_their_pictures(plain):
    options = OPTIONS | {"height": SIZE, "width": SIZE}
    frames = plain.random_walk(["red heart", "blue heart", "flag of Japan"], 5, "dark", seed=3, **options)
    assert frames.shape == (5, SIZE, SIZE, 3)
    for frame, prompt in ((0, "red heart"), (2, "blue heart"), (4, "flag of Japan")):
        expected = plain.text_to_image(prompt, "dark", seed=3, **options)[0]
        assert np.abs(frames[frame].astype(int) - expected).max() <= 1
    between = plain.encode_text(["red heart", "blue heart"]).mean(axis=0, keepdims=True)
    noise = NoiseStreams([3]).draw(plain.latent_shape(SIZE, SIZE))
    latents = plain.denoise(
        noise, between, plain.encode_text(["dark"]), num_inference_steps=20, guidance_scale=3.0
    )
    assert np.abs(frames[1].astype(int) - plain.decode(latents)[0]).max() <= 1


def test_a_walk_of_one_prompt_is_a_circle_of_noises(plain):
    options = OPTIONS | {"height": SIZE, "width": SIZE}
    frames = plain.random_walk("red heart", 8, seed=3, **options)
    expected = plain.text_to_image("red heart", num_images=2, seed=3, **options)
    for frame, picture in ((0, 0), (2, 1)):  # a quarter of the circle leads from one noise to the other
        assert np.abs(frames[frame].astype(int) - expected[picture]).max() <= 1
    steps = np.abs(np.diff(frames.astype(int), axis=0, append=frames[:1].astype(int))).mean(axis=(1, 2, 3))
    assert steps.min() > 0 and steps.max() < 4 * np.median(steps)  # the last leads to the first


def test_fewer_evaluations_reach_the_model(plain):
    noise = NoiseStreams([3]).draw(plain.latent_shape())
    encodings = plain.encode_text(["red heart", ""])
    fewer = {"reuse_interval": 2, "guidance_interval": (0.0, 0.5)}
    for part in (fewer, {}, *({name: value} for name, value in fewer.items())):
        options = {"num_inference_steps": 4, "guidance_scale": 3.0, **part}
        expected = plain.decode(plain.denoise(noise, encodings[:1], encodings[1:], **options))
        found = plain.text_to_image("red heart", seed=3, progress=False, **options)
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match="reuse_interval 0: out of range"):
        plain.text_to_image("red heart", reuse_interval=0)


def test_long_and_weighted_prompts_reach_the_model(plain):
    options = OPTIONS | {"num_inference_steps": 4}
    long = "red heart " * 12 + "(flag:1.5)"
    pictures = [plain.text_to_image(prompt, **options) for prompt in (long, long[:-10] + "(flag:0.5)", "red")]
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 2
    context = plain.encode_text([long, "red"])
    assert context.shape[0] == 2 and context.shape[1] % 12 == 0 and context.shape[1] > 12
    np.testing.assert_allclose(plain.encode_text(["red"]), context[1:, :12], atol=1e-5)


ONE, TWO, THREE = "red heart", "red heart BREAK woman running", "flag BREAK (of:1.3) BREAK Japan"


def apart(images, others):
    return np.abs(images.astype(int) - others.astype(int)).max()


def test_an_image_does_not_depend_on_the_other_prompts_of_its_batch(pictures, mask):
    # Small networks, as they are traced for every number of prompts and every length.
    plain = tiny.pipeline(SchedulerConfig(), tiny.ONE_BLOCK_UNET, jit_compile=False)
    nine_channels = dataclasses.replace(tiny.ONE_BLOCK_UNET, in_channels=9)
    inpainting = tiny.pipeline(SchedulerConfig(), nine_channels, jit_compile=False)
    prompts, negatives = [ONE, TWO, THREE, ONE], ["", THREE, TWO, TWO]
    options = OPTIONS | {"num_inference_steps": 10, "seed": 5}
    for images, alone in (
        (plain.text_to_image(prompts, negatives, **options), plain.text_to_image),
        (
            plain.image_to_image(pictures[1], prompts, negatives, **options),
            functools.partial(plain.image_to_image, pictures[1]),
        ),
        (
            inpainting.inpaint(pictures[1], mask, prompts, negatives, **options),
            functools.partial(inpainting.inpaint, pictures[1], mask),
        ),
    ):
        for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
            single = alone(prompt, negative, **options | {"seed": 5 + index})
            assert apart(single, images[index : index + 1]) <= 1
        assert apart(images[0], images[3]) > 10
    walk = plain.random_walk([ONE, THREE], 2, TWO, **options)
    for prompt, frame in zip([ONE, THREE], walk, strict=True):
        assert apart(plain.text_to_image(prompt, TWO, **options)[0], frame) <= 1


def test_a_walk_goes_from_one_negative_prompt_to_the_next(plain):
    options = OPTIONS | {"num_inference_steps": 10, "seed": 5}
    walk = plain.random_walk([ONE, TWO], 3, ["dark", "flag"], **options)
    for prompt, negative, frame in ((ONE, "dark", walk[0]), (TWO, "flag", walk[2])):
        assert apart(plain.text_to_image(prompt, negative, **options)[0], frame) <= 1
    assert apart(plain.random_walk([ONE, TWO], 3, "dark", **options)[2], walk[2]) > 5


@pytest.mark.filterwarnings("ignore:negative_prompt has no effect")
def test_guidance_up_to_one_is_none(plain):
    def draw(scale, negative="flag"):
        options = OPTIONS | {"num_inference_steps": 5, "guidance_scale": scale}
        return plain.text_to_image("red heart", negative, **options)

    images = draw(1)
    for scale in (0, 0.5, np.float32(1)):
        np.testing.assert_array_equal(draw(scale), images)
    np.testing.assert_array_equal(draw(0, "dark"), images)
    assert apart(draw(1.5), images) > 1
    walk = [plain.random_walk("red heart", 1, **OPTIONS | {"guidance_scale": scale}) for scale in (0, 1)]
    np.testing.assert_array_equal(*walk)


def test_seeds_go_to_64_bits(plain):
    options = OPTIONS | {"num_inference_steps": 2}
    images = plain.text_to_image("red heart", num_images=2, seed=2**64 - 1, **options)
    assert apart(images[1:], plain.text_to_image("red heart", seed=0, **options)) <= 1
    beyond = plain.text_to_image("red heart", seed=2**63 + 1, **options)
    assert apart(beyond, plain.text_to_image("red heart", seed=1, **options)) > 10


@pytest.mark.parametrize("stroke", [(slice(9, 11), slice(3, 21)), (slice(3, 21), slice(7, 8)), (15, 15)])
def test_thin_strokes_of_a_mask_make_something_new(plain, inpainting, pictures, stroke):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[stroke] = True
    for model in (plain, inpainting):
        options = OPTIONS | {"num_inference_steps": 5}
        drawn = [model.inpaint(pictures[0], mask, "red heart", seed=seed, **options)[0] for seed in (0, 1)]
        changed = (drawn[0] != drawn[1]).any(axis=-1)
        assert changed[mask].all() and not changed[~mask].any()
        np.testing.assert_array_equal(drawn[0][~mask], pictures[0][~mask])


@pytest.mark.parametrize("fault", ["context", "weights", "noise", "float16", "vae"])
def test_numbers_that_are_not_finite_become_no_image(fault, tmp_path):
    model = tiny.pipeline(SchedulerConfig(), tiny.ONE_BLOCK_UNET, jit_compile=False)
    context = model.encode_text(["red heart", ""])[:, None]
    noise = NoiseStreams([0]).draw(model.latent_shape())
    options = {"num_inference_steps": 2, "guidance_scale": 2.0}
    if fault == "context":
        context[0, 0, 1, 2], line = np.nan, "text encoding: holds NaN or infinity"
    if fault == "noise":
        noise[0, 0, 0, 0], line = np.inf, "initial latents: holds NaN or infinity"
    if fault == "weights":
        bias = model.unet.conv_out.bias
        bias.assign(np.full(bias.shape, np.nan))
        line = "UNet: .* its weight .*conv_out.bias is not finite"
    if fault == "float16":
        kernel = model.unet.conv_in.kernel
        kernel.assign(np.full(kernel.shape, 60_000))
        model.save(tmp_path / "model")
        model = StableDiffusion.load(tmp_path / "model", dtype="float16", jit_compile=False)
        line = "UNet: .* float16 overflows; use bfloat16 or float32"
    if fault == "vae":
        kernel = model.vae.decoder.conv_out.kernel
        kernel.assign(np.full(kernel.shape, np.inf))
        line = "VAE: .* its weight .*conv_out.weight is not finite"
    with pytest.raises(UserError, match=line) as caught:
        model.decode(model.denoise(noise, *context, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "task, change, line",
    [
        ("image_to_image", {"strength": 0}, "strength 0: out of range"),
        ("image_to_image", {"strength": float("nan")}, "strength nan: out of range"),
        ("image_to_image", {"strength": float("inf")}, "strength inf: out of range"),
        ("image_to_image", {"guidance_scale": float("nan")}, "guidance_scale nan: out of range"),
        ("image_to_image", {"guidance_scale": float("inf")}, "guidance_scale inf: out of range"),
        ("image_to_image", {"num_inference_steps": 3.0}, "num_inference_steps 3.0: out of range"),
        ("image_to_image", {"guidance_scale": -0.5}, "guidance_scale -0.5: out of range"),
        ("image_to_image", {"guidance_scale": "7"}, "guidance_scale '7': out of range"),
        ("image_to_image", {"guidance_rescale": float("nan")}, "guidance_rescale nan: out of range"),
        ("image_to_image", {"guidance_interval": 0.5}, "guidance_interval 0.5: not a part of the steps"),
        ("image_to_image", {"seed": 2**64}, "seed 18446744073709551616: out of range"),
        ("random_walk", {"seed": 2**64, "prompts": "a"}, "seed 18446744073709551616: out of range"),
        ("random_walk", {"seed": 1.0, "prompts": "a"}, "seed 1.0: out of range"),
        ("random_walk", {"prompts": "a", "negative_prompt": ["b", "c"]}, "2 negative prompts for 1 prompts"),
        ("random_walk", {"prompts": "a", "height": 64.0}, "height 64.0: out of range"),
        ("random_walk", {"prompts": None}, "prompt None: no text"),
        ("image_to_image", {"prompt": None}, "prompt None: no text"),
        ("image_to_image", {"prompt": ["a", 3]}, r"prompt \['a', 3\]: no text"),
        ("image_to_image", {"negative_prompt": 3}, "negative_prompt 3: no text"),
        ("image_to_image", {"num_images": True}, "num_images True: out of range"),
        ("image_to_image", {"strength": "0.5"}, "strength '0.5': out of range"),
        ("image_to_image", {"strength": 1.1}, "strength 1.1: out of range"),
        ("image_to_image", {"strength": 0.01}, "strength 0.01: leaves none of 20 steps; use 0.05 or more"),
        (
            "image_to_image",
            {"image": np.zeros((22, 24, 3), "uint8")},
            "height 22: does not fit the model; use a",
        ),
        ("image_to_image", {"image": np.zeros((24, 24, 3))}, "images of type float64 and shape"),
        ("image_to_image", {"image": np.zeros((3, 24, 24, 3), "uint8")}, "3 images for 1 results"),
        ("inpaint", {"mask": np.ones((16, 24), "bool")}, "mask: is 24x16, the image 24x24"),
        ("inpaint", {"mask": np.zeros((24, 24))}, "mask of type float64"),
        ("inpaint", {"mask": np.ones((24, 24), "uint8")}, "mask: has no white, .* brightest value is 1"),
        ("inpaint", {"mask": np.zeros((24, 24), "bool")}, "mask: has no white"),
        (
            "inpaint",
            {"mask": np.arange(2).repeat(576).reshape(2, 24, 24) == 0},
            "mask 1: has",
        ),
        ("upscale", {}, "is no upscaler; load one"),
        ("image_to_image", {"sampler": [1]}, r"sampler \[1\]: unknown"),
        ("image_to_image", {"sampler": {}}, "sampler {}: unknown"),
        ("image_to_image", {"sampler": np.zeros(300)}, "sampler array.*: unknown"),
        ("image_to_image", {"prompt": np.array(0.5)}, r"prompt array\(0.5\): no text"),
        ("image_to_image", {"negative_prompt": np.array(0.5)}, r"negative_prompt array\(0.5\): no text"),
        ("image_to_image", {"num_images": 10**30}, "num_images 10{30}: out of range"),
        ("image_to_image", {"num_images": 10**5000}, "num_images .too long to show.: out of range"),
        ("random_walk", {"prompts": "a", "height": 10**30}, "height 10{30}: out of range"),
        ("random_walk", {"prompts": "a", "width": 2**24}, "width 16777216: out of range"),
        ("random_walk", {"prompts": "a", "num_frames": 10**30}, "num_frames 10{30}: out of range"),
        ("random_walk", {"num_frames": 1, "prompts": ["a", "b"]}, "num_frames 1: fewer than the 2 prompts"),
        ("image_to_image", {"strength": 10**400}, "strength 10{100}.*: out of range"),
        ("image_to_image", {"guidance_scale": 10**400}, "guidance_scale 10{100}.*: out of range"),
        ("image_to_image", {"guidance_rescale": 10**400}, "guidance_rescale 10{100}.*: out of range"),
        ("image_to_image", {"guidance_interval": np.ones((9, 9))}, "guidance_interval array.*: not a part"),
        ("random_walk", {"prompts": "a", "eta": "1"}, "eta '1': out of range"),
        ("random_walk", {"prompts": "a", "progress": "x"}, "progress 'x': give True, False or a function"),
        ("random_walk", {"prompts": "a", "progress": 1}, "progress 1: give True, False or a function"),
        ("random_walk", {"prompts": []}, "prompt: the list is empty"),
        (
            "inpaint",
            {"mask": np.ones((24, 24, 1), "bool")},
            "mask: has shape .24, 24, 1., .* without channels",
        ),
        (
            "inpaint",
            {"mask": np.full((24, 24, 3), 255, "uint8")},
            "mask: has shape .24, 24, 3., the image 24x24",
        ),
    ],
)
def test_bad_input_is_one_line(plain, task, change, line):
    given = {"prompt": "red heart", "image": np.zeros((24, 24, 3), "uint8")}
    if task == "inpaint":
        given["mask"] = np.full((24, 24), 255, "uint8")
    if task == "random_walk":
        given = {}
    with pytest.raises(UserError, match=line) as caught:
        getattr(plain, task)(**(OPTIONS | given | change))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*cannot hold")
def test_bad_input_of_primitives_is_one_line(plain, tmp_path):
    context = plain.encode_text("a cat")
    with pytest.raises(UserError, match=r"text encoding of shape \(1, 2\): does not fit the model; give"):
        plain.denoise(np.zeros((1, 8, 8, 4), "float32"), np.zeros((1, 2), "float32"), guidance_scale=1)
    for shape in ((4, 4), (1, 8, 8, 3), (0, 8, 8, 4)):
        for draw in (plain.decode, functools.partial(plain.denoise, context=context, guidance_scale=1)):
            with pytest.raises(UserError, match="latents of shape .*: does not fit the model; give"):
                draw(np.zeros(shape, "float32"))
    for prompts in (np.array(0.5), 5):
        with pytest.raises(UserError, match="prompts .*: no text"):
            plain.encode_text(prompts)
    for chunks in (10**9, "x", True, 0):
        with pytest.raises(UserError, match="chunks .*: out of range"):
            plain.encode_text("a", chunks=chunks)
    for path in ("", " ", "x\0", None, 5):
        with pytest.raises(UserError, match="path.*: (empty|not a name|no name)"):
            plain.save(path)
    for name in ("a" * 300, "a" * 300 + ".safetensors"):
        with pytest.raises(UserError, match="a: .*[Nn]ame too long|a.safetensors: .*[Nn]ame too long"):
            plain.save(tmp_path / name)


@pytest.mark.parametrize("task", ["text_to_image", "image_to_image", "inpaint", "upscale", "random_walk"])
def test_tasks_take_their_published_arguments_only(plain, task):
    taken = inspect.signature(getattr(plain, task)).parameters
    given = {name: None for name in ("image", "mask", "prompt", "prompts") if name in taken}
    unknown = {
        "strength",
        "height",
        "channels",
        "known",
        "first_step",
        "streams",
        "begin",
        "shape",
        "latents",
    }
    for name in unknown - taken.keys():
        with pytest.raises(TypeError, match=rf"{task}\(\): got an unexpected keyword argument '{name}'"):
            getattr(plain, task)(**given, **{name: None})


def test_prompts_may_be_read_once_only(plain):
    options = OPTIONS | {"num_inference_steps": 1, "seed": 3}
    prompts, negatives = ["red heart", "flag"], ["dark", "blue"]
    images = plain.text_to_image(prompts, negatives, **options)
    np.testing.assert_array_equal(plain.text_to_image(iter(prompts), iter(negatives), **options), images)
    np.testing.assert_array_equal(plain.encode_each(iter(prompts)), plain.encode_each(prompts))
    np.testing.assert_array_equal(plain.encode_each("flag"), plain.encode_each(["flag"]))
    for encode in (plain.encode_text, plain.encode_each):
        with pytest.raises(UserError, match="prompts: the list is empty"):
            encode([])


@pytest.mark.parametrize(
    "name, value", [("negative_prompt", "dark"), ("guidance_rescale", 0.7), ("guidance_interval", (0, 0.5))]
)
def test_arguments_of_guidance_warn_where_there_is_none(plain, name, value):
    options = OPTIONS | {"num_inference_steps": 1, "guidance_scale": 1}
    with pytest.warns(UserWarning, match=f"{name} has no effect at guidance_scale 1") as told:
        plain.text_to_image("flag", **options, **{name: value})
    assert [each.filename for each in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.text_to_image("flag", "", **options, guidance_rescale=0.0, guidance_interval=[0, 1])
        plain.text_to_image("flag", **options | {"guidance_scale": 3.0}, **{name: value})


def test_arrays_of_any_real_type_are_taken(plain, upscaler):
    options = {"num_inference_steps": 1, "guidance_scale": 1}
    context, noise = plain.encode_text("a cat"), np.round(NoiseStreams([1]).draw((4, 4, 4)))
    latents = plain.denoise(noise, context, **options)
    for kind in ("float64", "int64", "float16"):
        np.testing.assert_array_equal(plain.denoise(noise.astype(kind), context, **options), latents)
        np.testing.assert_array_equal(plain.decode(noise.astype(kind)), plain.decode(noise))
    tensors = map(ops.convert_to_tensor, (noise, context))
    np.testing.assert_array_equal(plain.denoise(*tensors, **options), latents)
    np.testing.assert_array_equal(plain.denoise(noise.tolist(), context.tolist(), **options), latents)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"latents": "x"}, "latents of type str: not real numbers"),
        ({"latents": np.zeros((1, 4, 4, 4), "complex64")}, "latents of type complex64: not real numbers"),
        ({"latents": [[1], [1, 2]]}, "latents of type list: not real numbers"),
        ({"context": None}, "text encoding of type NoneType: not real numbers"),
        ({"class_labels": [1]}, "class_labels: the UNet takes none; leave them out"),
        ({"channels": np.zeros((1, 4, 4, 1))}, "channels: the UNet takes none; leave them out"),
        ({"known": 5}, "known 5: of another type"),
        ({"known": Known(np.ones((1, 4, 4, 1)), None, None)}, "sample to keep of type NoneType"),
        ({"known": Known(*[np.ones((1, 4, 4, 4))] * 3)}, r"mask of what to keep of shape \(1, 4, 4, 4\)"),
        ({"streams": 5}, "streams 5: do not fit; give NoiseStreams of 1 seeds"),
        ({"streams": NoiseStreams([1, 2])}, "streams .*: do not fit; give NoiseStreams of 1 seeds"),
        ({"sampler": "euler_a"}, "sampler Euler a: draws noise; give streams"),
        ({"guidance_scale": 3}, "guidance_scale 3: needs a negative text encoding"),
        ({"guidance_scale": 3, "negative": np.zeros((2, 12, 16))}, "negative text encoding of shape"),
        ({"on_step": 5}, "on_step 5: no function"),
        *[({"first_step": value}, "first_step .*: out of range; use a whole") for value in ("1", 0.5, None)],
    ],
)
def test_bad_inputs_of_denoise_are_one_line(plain, change, line):
    given = {"latents": np.zeros((1, 4, 4, 4)), "context": np.zeros((1, 12, 16)), "guidance_scale": 1}
    with pytest.raises(UserError, match=line) as caught:
        plain.denoise(**given | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"channels": None}, "channels: the UNet takes them; give them"),
        (
            {"channels": np.zeros((1, 4, 4, 2))},
            "channels of shape .* does not fit the model; give .1, 4, 4, 3",
        ),
        ({"class_labels": None}, "class_labels: the UNet takes them; give them"),
        ({"class_labels": [0.5]}, "class_labels 0.5: out of range; use whole numbers from 0 to 999"),
        ({"class_labels": [1000]}, "class_labels 1000.0: out of range"),
    ],
)
def test_bad_inputs_of_an_upscaler_are_one_line(upscaler, change, line):
    given = {"latents": np.zeros((1, 4, 4, 4)), "context": np.zeros((1, 12, 16)), "guidance_scale": 1}
    given |= {"channels": np.zeros((1, 4, 4, 3)), "class_labels": [1]}
    with pytest.raises(UserError, match=line):
        upscaler.denoise(**given | change)


def test_models_of_another_task_say_so(inpainting, upscaler, pictures):
    with pytest.raises(UserError, match="text_to_image: keras_sd was trained for another task; use inpaint"):
        inpainting.text_to_image("red heart", **OPTIONS)
    with pytest.raises(UserError, match="image_to_image: keras_sd was trained for another task; use upscale"):
        upscaler.image_to_image(pictures, "red heart", **OPTIONS)
    with pytest.raises(UserError, match="noise_level 1000: out of range; use a whole number from 0 to 999"):
        upscaler.upscale(pictures, noise_level=1000, **OPTIONS)
