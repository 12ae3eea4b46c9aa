import json

import numpy as np
import pytest

from keras_sd.config import ImageEncoderConfig, TextEncoderConfig, UNetConfig, VAEConfig
from keras_sd.data.emoji.evaluation import (
    by_hash,
    evaluate_emoji,
    format_table,
    generate_batch,
    held_out_rates,
)
from keras_sd.data.emoji.source import load_emoji
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.metrics.reconstruction import peak_signal_to_noise_ratio
from keras_sd.models.batches import equal_batches
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.pipeline.stable_diffusion import StableDiffusion

TINY_ENCODER = ImageEncoderConfig(
    image_size=32,
    patch_size=16,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    projection_dim=8,
)
TINY_VAE = VAEConfig(
    sample_size=64,
    latent_channels=4,
    block_out_channels=(4, 4, 4, 8),
    layers_per_block=1,
    norm_num_groups=4,
)


TINY_UNET = UNetConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 8),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)


def tiny_parts():
    tokenizer = Tokenizer.train([one.captions[0] for one in load_emoji()[:50]], vocab_size=600, max_length=16)
    text = TextEncoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=8,
        bos_token_id=tokenizer.begin_token_id,
        eos_token_id=tokenizer.end_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": TextEncoder(text),
        "unet": UNet(TINY_UNET),
        "vae": AutoencoderKL(TINY_VAE),
        "scheduler_config": SchedulerConfig(),
        "image_encoder": ImageEncoder(TINY_ENCODER),
    }


class Archive(StableDiffusion):
    """A generator that looks the image up: the best there could be."""

    def __init__(self):
        super().__init__(**tiny_parts(), jit_compile=False)
        self.pictures = {one.captions[0]: one for one in load_emoji()}
        self.calls, self.shortcuts = [], set()

    def text_to_image(
        self,
        prompt,
        *,
        num_inference_steps,
        guidance_scale,
        guidance_rescale,
        guidance_interval,
        reuse_interval,
        seed,
        sampler,
        progress,
    ):
        self.calls.append((len(prompt), seed, num_inference_steps, guidance_scale, sampler, progress))
        self.shortcuts.add((*guidance_interval, reuse_interval, guidance_rescale))
        return np.stack([self.pictures[text].load(64) for text in prompt])


def test_perfect_pictures_get_perfect_figures():
    archive = Archive()
    bars = []
    results = evaluate_emoji(
        archive,
        num_inference_steps=3,
        seed=7,
        batch_size=64,
        progress=lambda iterable, description: bars.append(description) or iterable,
    )
    assert results == json.loads(json.dumps(results))
    assert results["training_top1"] == results["held_out_concept"] == results["held_out_variant"] == 1.0
    assert results["training_edge_energy"] == 1.0
    assert results["training_prompts"] == results["held_out_prompts"] == 200
    assert 1600 < results["base_concepts"] < results["images"]
    # The very same images on both sides: nothing but the scatter of the subsets is left.
    assert results["fid"] == pytest.approx(0, abs=1e-6)
    assert abs(results["kid"]) < 3 * results["kid_standard_deviation"]
    assert abs(results["kid_floor_mean"]) <= results["kid_floor"]
    assert results["kid_ratio"] == results["kid"] / results["kid_floor"]
    assert 0 < results["generation_seconds"] < 30
    images = np.stack([one.load(64) for one in load_emoji() if one.split == "validation"])
    through_vae = archive.vae.decode(archive.vae.encode(images[:20] / np.float32(127.5) - 1).mode())
    levels = np.clip(np.round((np.array(through_vae) + 1) * 127.5), 0, 255).astype("uint8")
    first = peak_signal_to_noise_ratio(images[:20], levels)
    rest = peak_signal_to_noise_ratio(images[20:], archive.decode(archive.encode_image(images[20:])))
    assert results["reconstruction_psnr"] == pytest.approx(0.1 * first + 0.9 * rest, abs=1e-2)
    # Random weights decode to noise: unlike, and with more edges than an emoji.
    assert results["reconstruction_ssim"] < 0.5 and results["reconstruction_edge_energy"] != 1
    assert results["targets"]["reconstruction_psnr"] == {"bar": 29.0, "hoped": 31.0}
    assert results["targets"].keys() <= results.keys()
    assert bars == ["images", "training prompts", "held-out prompts"]
    # Equal batches, image i drawn from seed + i; then six calls of four for the time.
    batches = [(50, 7 + start, 3, 7.5, None, False) for start in range(0, 200, 50)]
    assert archive.calls == batches * 2 + [(4, 7, 3, 7.5, None, False)] * 6
    assert archive.shortcuts == {(0.0, 1.0, 1, 0.0)}
    assert results["sampler"] == "DDIM"
    table = format_table(results)
    assert table.count("as hoped") >= 4
    assert "100.0%" in table and "29.00 dB" in table


def test_held_out_rates_tell_the_variant_from_its_concept():
    emoji = load_emoji()[:800]
    images = np.stack([one.load(64) for one in emoji])
    held_out = np.array([i for i, one in enumerate(emoji) if one.split == "validation"])[:10]
    generated = images[held_out]
    assert held_out_rates(emoji, images, held_out, generated) == {
        "held_out_concept": 1.0,
        "held_out_variant": 1.0,
    }
    others = [
        i for i, one in enumerate(emoji) if one.concept == emoji[held_out[0]].concept and i != held_out[0]
    ]
    generated[0] = images[others[0]]  # the right concept in another skin tone
    generated[1:4] = 128  # nothing at all
    rates = held_out_rates(emoji, images, held_out, generated)
    assert rates == {"held_out_concept": 0.7, "held_out_variant": 0.6}


def test_order_by_hash_is_fixed():
    emoji = load_emoji()
    order = by_hash(emoji, range(len(emoji)), "prompts")
    assert sorted(order) == list(range(len(emoji)))
    assert list(order) != list(by_hash(emoji, range(len(emoji)), "other"))
    codes = [emoji[i].code for i in by_hash(emoji, range(len(emoji))[::-1], "prompts")]
    assert codes == [emoji[i].code for i in order]


def test_batches_are_filled_up_and_seeded_by_position():
    pipeline = StableDiffusion(**tiny_parts(), batch_size=2, jit_compile=False)
    prompts = ["red heart", "grinning face", "green apple"]
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "sampler": "ddim"}
    batches = equal_batches(len(prompts), 2)
    first, last = (generate_batch(pipeline, prompts, batch, 10, options) for batch in batches)
    assert last.shape == (2, 64, 64, 3) and last.dtype == np.uint8
    alone = pipeline.text_to_image(["green apple"] * 2, seed=12, progress=False, **options)
    np.testing.assert_array_equal(last[0], alone[0])
    together = pipeline.text_to_image(prompts, seed=10, progress=False, **options)
    assert np.abs(np.concatenate([first, last[:1]]).astype(int) - together).max() <= 1


def test_table_tells_what_is_met():
    results = {
        "reconstruction_psnr": 29.5,
        "reconstruction_edge_energy": 1.08,
        "training_top1": 0.2,
        "training_edge_energy": 1.4,
        "held_out_concept": 0.95,
        "held_out_variant": 0.6,
        "kid": 0.01,
        "kid_floor": 0.002,
        "kid_ratio": 5.0,
        "generation_seconds": 1.6,
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_table(results).splitlines()]
    assert rows[0] == ["measure", "bar", "hoped for", "figure", "met"]
    assert len({len(line) for line in format_table(results).splitlines()}) == 1
    verdicts = [row[-1] for row in rows[2:]]
    # Too much edge energy misses the bar as too little does.
    edges, of_generated = verdicts.pop(1), verdicts.pop(2)
    assert (edges, of_generated) == ("yes", "no")
    assert verdicts == ["yes", "no", "as hoped", "yes", "reported", "reported", "no", "yes"]
    assert rows[2][1:4] == ["29.00 dB", "31.00 dB", "29.50 dB"]


def test_a_model_without_an_image_encoder_is_refused():
    archive = Archive()
    archive.image_encoder = None
    with pytest.raises(UserError, match="image_encoder"):
        evaluate_emoji(archive)
