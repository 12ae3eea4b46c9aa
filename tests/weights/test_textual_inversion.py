"""Files of learned words against diffusers' own, in every dialect; and the words at work in a pipeline."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd.cli.model_options import open_model
from keras_sd.errors import UserError
from keras_sd.pipeline.prompts import chunk_prompts
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.weights.textual_inversion import read_embeddings, write_embeddings
from tests import tiny
from tests.programs import run_python
from tests.reference import run_reference

WIDTH = 16
TABLE = "text_model.embeddings.token_embedding.weight"

# torch writes a word in every dialect; diffusers draws latents with its own files and with ours.
SCRIPT = """
from diffusers import StableDiffusionPipeline

def pipeline(name="model"):
    pipe = StableDiffusionPipeline.from_pretrained(folder / name, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def latents(pipe, prompt):
    noise = inputs["noise"].permute(0, 3, 1, 2)
    result = pipe(prompt, negative_prompt="", latents=noise, num_inference_steps=4, guidance_scale=3.0,
                  output_type="latent").images
    return result.permute(0, 2, 3, 1)

one, three = inputs["one"], inputs["three"]
save_file({"<One>": one}, folder / "learned_embeds.safetensors")
torch.save({"<three>": three}, folder / "three.bin")
torch.save({"<flat>": one[0].half()}, folder / "flat.bin")
torch.save(three, folder / "bare.pt")
web = {"string_to_token": {"*": 265}, "name": "web-word", "step": 99, "sd_checkpoint": None}
torch.save(web | {"string_to_param": {"*": three}}, folder / "dictionary.pt")
parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(three)})
torch.save(web | {"string_to_param": parameters}, folder / "parameters.pt")
torch.save(web | {"string_to_param": parameters}, folder / "old.pt", _use_new_zipfile_serialization=False)
save_file({"emb_params": three}, folder / "kohya.safetensors")

pipe = pipeline()
pipe.load_textual_inversion(folder, weight_name="learned_embeds.safetensors")
outputs["one"] = latents(pipe, "red <One>")
pipe.load_textual_inversion(folder / "three.bin")
outputs["three"] = latents(pipe, "<three> red")
outputs["both"] = latents(pipe, "<three>,<One>")
pipe = pipeline()
pipe.load_textual_inversion(folder / "ours.safetensors")
outputs["ours"] = latents(pipe, "red <ours>")
pipe = pipeline()
pipe.load_textual_inversion(folder / "ours_kohya.safetensors", token="<ours>")
outputs["ours_kohya"] = latents(pipe, "red <ours>")
pipe = pipeline("with_words")
outputs["with_words"] = latents(pipe, "red <ours>")
outputs["table"] = pipe.text_encoder.get_input_embeddings().weight
"""


def vectors(count, seed):
    return 0.5 * np.random.default_rng(seed).standard_normal((count, WIDTH), dtype="float32")


ONE, THREE, OURS = vectors(1, 1), vectors(3, 2), vectors(3, 3)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(5).standard_normal((1, 4, 4, 4), dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def pipeline(folder):
    """Knows `<ours>`, from a file of ours."""
    pipeline = tiny.pipeline(jit_compile=False)
    pipeline.save(folder / "model")
    pipeline.encode_text("red")  # compiled before there are words
    write_embeddings(folder / "ours.safetensors", {"<ours>": OURS})
    write_embeddings(folder / "ours_kohya.safetensors", {"<ours>": OURS}, "kohya")
    pipeline.load_textual_inversion(folder / "ours.safetensors")
    pipeline.save(folder / "with_words")
    return pipeline


@pytest.fixture(scope="module")
def reference(pipeline, folder, noise):
    return run_reference(SCRIPT, {"noise": noise, "one": ONE, "three": THREE}, folder)


def latents(pipeline, noise, prompt):
    context, negative = pipeline.encode_text([prompt, ""])
    assert context.shape == (12, WIDTH)
    return pipeline.denoise(noise, context[None], negative[None], num_inference_steps=4, guidance_scale=3.0)


def close(ours, theirs):
    return np.abs(ours - theirs).max() < 1e-5 * theirs.std()


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("learned_embeds.safetensors", "<One>", ONE),
        (".", "<One>", ONE),
        ("three.bin", "<three>", THREE),
        ("flat.bin", "<flat>", ONE.astype("float16")),
        ("bare.pt", None, THREE),
        ("dictionary.pt", "web-word", THREE),
        ("parameters.pt", "web-word", THREE),
        ("old.pt", "web-word", THREE),
        ("kohya.safetensors", None, THREE),
        ("ours.safetensors", "<ours>", OURS),
        ("ours_kohya.safetensors", None, OURS),
    ],
)
def test_every_dialect_is_read(folder, reference, name, token, expected):
    embeddings = read_embeddings(folder / name, WIDTH)
    assert list(embeddings) == [token]
    assert embeddings[token].dtype == np.float32
    np.testing.assert_array_equal(embeddings[token], expected)


def test_latents_with_what_diffusers_wrote(pipeline, folder, reference, noise):
    pipeline.load_textual_inversion(folder)
    assert close(latents(pipeline, noise, "red <One>"), reference["one"])
    pipeline.load_textual_inversion(folder / "three.bin")
    assert close(latents(pipeline, noise, "<three> red"), reference["three"])
    assert close(latents(pipeline, noise, "<three>,<One>"), reference["both"])
    assert not close(reference["three"], reference["both"])
    # The prompt language weighs all vectors of a word.
    ids, weights = chunk_prompts(pipeline.tokenizer, ["red (<three>:1.5)"])
    first = pipeline.tokenizer.added_tokens["<three>"]
    assert [weights[ids == token].tolist() for token in range(first, first + 3)] == [[1.5]] * 3


def test_diffusers_draws_the_same_with_what_we_write(pipeline, reference, noise):
    ours = latents(pipeline, noise, "red <ours>")
    for name in ("ours", "ours_kohya", "with_words"):
        assert close(ours, reference[name]), name
    assert not close(latents(pipeline, noise, "red "), reference["ours"])


def test_saved_words_are_read_as_a_larger_table(folder, reference, noise):
    again = StableDiffusion.load(folder / "with_words", jit_compile=False)
    table = np.asarray(again.text_encoder.embeddings.token_embedding.embeddings)
    plain = load_file(folder / "model" / "text_encoder" / "model.safetensors")[TABLE]
    np.testing.assert_array_equal(table, np.concatenate([plain, OURS]))
    np.testing.assert_array_equal(table, reference["table"])
    assert again.text_encoder.embeddings.learned_embedding is None
    assert again.text_encoder.config.vocab_size == again.tokenizer.vocab_size == len(table)
    # Words go on from there.
    again.load_textual_inversion(folder / "three.bin", "<more>")
    (ids,) = again.tokenizer.encode(["<ours><more>"])
    assert ids == list(range(len(plain), len(plain) + 6))
    found = again.text_encoder.embeddings.token_vectors(np.array(ids))
    np.testing.assert_array_equal(found, np.concatenate([OURS, THREE]))
    with pytest.raises(UserError, match="no place for learned words"):
        again.save(folder / "single.safetensors")


def test_words_under_jax_and_in_the_command(pipeline, folder):
    """The same encodings on the other backend, with the word loaded after the encoder was compiled."""
    program = """if True:
        import sys
        import numpy as np
        from keras_sd.cli.model_options import open_model
        pipeline = open_model(sys.argv[1] + "/model")
        pipeline.encode_text("red")
        pipeline.load_textual_inversion(sys.argv[1] + "/ours.safetensors")
        np.save(sys.argv[1] + "/jax.npy", pipeline.encode_text("red <ours>"))
    """
    run_python(["-c", program, folder])
    expected = pipeline.encode_text("red <ours>")
    np.testing.assert_allclose(np.load(folder / "jax.npy"), expected, atol=1e-5)

    words = [f"{folder / 'ours.safetensors'}", f"{folder / 'ours_kohya.safetensors'}:<again>"]
    opened = open_model(str(folder / "model"), embeddings=words, jit_compile=False)
    for prompt in ("red <ours>", "red <again>"):
        np.testing.assert_allclose(opened.encode_text(prompt), expected, atol=1e-6)
    with pytest.raises(UserError, match=r"missing.pt: no such embedding"):
        open_model(str(folder / "model"), embeddings=[f"{folder / 'missing.pt'}:<again>"])


BAD_FILES = {
    "embeddings are 8 wide, the text encoder's 16": {"<a>": np.ones((2, 8), "float32")},
    "NaN or infinity": {"<a>": np.full((1, WIDTH), np.nan, "float32")},
    "embeddings of Stable Diffusion XL": {"clip_g": ONE, "clip_l": ONE},
    "holds no embeddings": {"<a>": np.ones((2, 2, WIDTH), "float32")},
    "76 vectors for one word, where a prompt has room for 75": {"<a>": np.ones((76, WIDTH), "float32")},
    "'further' beside emb_params": {"emb_params": ONE, "further": ONE},
    "'BREAK': begins a new chunk": {"BREAK": ONE},
    "no name for its word": {"emb_params": ONE},
    "'<ours>': is in the vocabulary already": {"<ours>": ONE},
    "'<OURS>_2': is in the vocabulary already": {"<OURS>_2": ONE},
    "'A': is in the vocabulary already": {"<a>": ONE, "A": ONE},
    "'a b': empty, or with a space": {"a b": ONE},
    "'<a:b>': empty, or with a space, bracket, colon": {"<a:b>": ONE},
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files_are_told_in_one_line_and_change_nothing(pipeline, tmp_path, fault):
    before = pipeline.tokenizer, pipeline.text_encoder.config
    save_file(BAD_FILES[fault], tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=fault) as caught:
        pipeline.load_textual_inversion(tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)
    assert (pipeline.tokenizer, pipeline.text_encoder.config) == before


def test_other_bad_input(pipeline, tmp_path):
    save_file({"<a>": ONE, "<b>": ONE}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="holds several words, <a>, <b>"):
        pipeline.load_textual_inversion(tmp_path / "two.safetensors", "<c>")
    with pytest.raises(UserError, match="learned_embeds.safetensors: no such file"):
        pipeline.load_textual_inversion(tmp_path)
    with pytest.raises(UserError, match="kohya's files hold one word, not 2"):
        write_embeddings(tmp_path / "x.safetensors", {"<a>": ONE, "<b>": ONE}, "kohya")
    with pytest.raises(UserError, match="dialect 'a1111'.*use diffusers or kohya"):
        write_embeddings(tmp_path / "x.safetensors", {"<a>": ONE}, "a1111")
    parts = pipeline.text_encoder, pipeline.unet, pipeline.vae, pipeline.scheduler_config
    unequal = StableDiffusion(tiny.tokenizer(), *parts)
    with pytest.raises(UserError, match=r"the tokenizer has (\d+) tokens, the text encoder (?!\1)\d+;"):
        unequal.add_tokens({"<a>": ONE})
