"""Textual inversion: what a new word begins as, what is trained, what is kept, and its command."""

import dataclasses
import sys
import warnings

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_sd.cli.program import run_command
from keras_sd.cli.train.textual_inversion import textual_inversion
from keras_sd.data.folders import FolderSource
from keras_sd.errors import UserError
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.textual_inversion import (
    TEMPLATES,
    encode_examples,
    initial_vectors,
    inversion_example,
    train_textual_inversion,
)
from keras_sd.training.trainer import Settings
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.training.test_dreambooth import write_pictures
from tests.training.test_trainer import copy_as_of_step

STEPS = 12
LEARNED = "text_model.embeddings.learned_embedding.weight"
TABLE = "text_model.embeddings.token_embedding.weight"


def pipeline():
    unet = dataclasses.replace(tiny.ONE_BLOCK_UNET, mid_block_type="UNetMidBlock2D")
    return tiny.pipeline(unet=unet, jit_compile=False, batch_size=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images") / "cat", 3, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    pipeline().save(folder)
    return folder


@pytest.fixture(scope="module")
def untouched():
    return pipeline()


def train(folder, pictures, **options):
    """Trains three vectors of `<cat>`."""
    settings = {
        "output_dir": folder,
        "max_train_steps": STEPS,
        "train_batch_size": 2,
        "learning_rate": 0.1,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "checkpointing_steps": STEPS // 2,
        "jit_compile": False,
    }
    names = settings.keys() | {"resume_from_checkpoint"}
    settings |= {name: options.pop(name) for name in names & options.keys()}
    keras.utils.set_random_seed(0)
    sd = pipeline()

    finished = train_textual_inversion(
        Settings(**settings),
        sd,
        FolderSource(pictures, 16, need_captions=False),
        placeholder_token="<cat>",
        **{"initializer_token": "red", "num_vectors": 3, **options},
    )
    return sd, finished


def drawn(sd, pictures, count):
    """A batch of `count` draws from the images, and the captions that they are drawn from."""
    encoded, captions = encode_examples(
        Settings("run", jit_compile=False), sd, FolderSource(pictures, 16, False), "<cat>", "object"
    )
    generator = np.random.default_rng(9)
    options = {"noise": NoiseDrawing(DiffusionSettings(), 1000), "condition": encoded.condition}
    draws = [inversion_example(encoded[index % 3], generator, captions, **options) for index in range(count)]
    return {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}, captions


def loss(sd, pictures, vectors):
    """The mean loss of a model whose new word has these vectors."""
    learned = sd.text_encoder.embeddings.learned_embedding.embeddings
    before = np.array(learned)
    learned.assign(vectors)
    objective = DiffusionObjective(sd.unet, sd._denoiser.schedule, text_encoder=sd.text_encoder)
    mean = np.mean(objective(drawn(sd, pictures, 200)[0]))
    learned.assign(before)
    return mean


def table_rows(sd, text):
    (ids,) = sd.tokenizer.encode([text])
    return torch_state(sd.text_encoder)[TABLE][ids]


def test_words_begin_as_their_initializer_says(untouched):
    rows = table_rows(untouched, "red heart")
    assert len(rows) == 3
    for count, expected in ((1, rows[:1]), (3, rows), (5, rows[[0, 1, 2, 0, 1]])):
        np.testing.assert_array_equal(initial_vectors(untouched, count, "red heart"), expected)
    table = torch_state(untouched.text_encoder)[TABLE]
    vectors = initial_vectors(untouched, 400, seed=3)
    np.testing.assert_array_equal(vectors, initial_vectors(untouched, 400, seed=3))
    np.testing.assert_allclose(vectors.mean(axis=0), table.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(vectors.std(axis=0), 0.1 * table.std(axis=0), rtol=0.2)
    with pytest.raises(UserError, match="has no letters"):
        initial_vectors(untouched, 1, " ")


def test_each_example_has_any_one_of_the_captions(pictures):
    sd = pipeline()
    sd.add_tokens({"<cat>": np.zeros((3, 16), "float32")})
    batch, captions = drawn(sd, pictures, 300)
    assert batch["token_ids"].dtype == np.int32 and batch["samples"].shape == (300, 4, 4, 4)
    # The shorter ones of all, in which the whole word has room.
    assert 3 <= len(captions) < len(TEMPLATES["object"])
    counts = [(batch["token_ids"] == caption).all(axis=1).sum() for caption in np.unique(captions, axis=0)]
    assert sum(counts) == 300 and min(counts) >= 10
    # The word alone: begin, its three vectors, end.
    word = list(sd.tokenizer.added_tokens.values())
    assert all(np.isin(word, caption).all() for caption in captions)
    ends = sd.tokenizer.begin_token_id, sd.tokenizer.end_token_id
    assert captions[0][:5].tolist() == [ends[0], *word, ends[1]]
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates) and all(text.count("{}") == 1 for text in templates)


def test_only_the_new_rows_are_trained_and_a_resumed_run_is_the_same(tmp_path, pictures, untouched):
    sd, finished = train(tmp_path / "whole", pictures)
    assert finished
    copy_as_of_step(STEPS // 2, tmp_path / "whole", tmp_path / "parts")
    assert train(tmp_path / "parts", pictures, resume_from_checkpoint="latest")[1]
    for group in ("weights", "ema", "optimizer"):
        whole, parts = (
            load_file(tmp_path / name / f"checkpoint-{STEPS}" / f"{group}.safetensors")
            for name in ("whole", "parts")
        )
        assert whole.keys() == parts.keys()
        for name, array in whole.items():
            np.testing.assert_array_equal(array, parts[name])
    assert list(whole) and {array.shape for array in whole.values()} <= {(), (3, 16)}

    learned, initial = torch_state(sd.text_encoder)[LEARNED], initial_vectors(untouched, 3, "red")
    assert (np.abs(learned - initial).max(axis=1) > 0.05).all()
    # As far as a random UNet listens to words at all.
    assert loss(sd, pictures, learned) < loss(sd, pictures, initial) - 0.03
    for part in ("text_encoder", "unet", "vae"):
        after, before = (torch_state(getattr(one, part)) for one in (sd, untouched))
        assert after.keys() - before.keys() == ({LEARNED} if part == "text_encoder" else set())
        for name, array in before.items():
            np.testing.assert_array_equal(array, after[name], err_msg=name)

    # What is written is the average, in both dialects.
    average = load_file(tmp_path / "whole" / f"checkpoint-{STEPS}" / "ema.safetensors")
    (average,) = average.values()
    written = tmp_path / "whole" / "model"
    files = {path.name: load_file(path) for path in written.iterdir()}
    assert {name: list(tensors) for name, tensors in files.items()} == {
        "learned_embeds.safetensors": ["<cat>"],
        "embedding_kohya.safetensors": ["emb_params"],
    }
    for tensors in files.values():
        (array,) = tensors.values()
        np.testing.assert_array_equal(array, average)
    assert np.abs(average - learned).max() > 1e-3

    with pytest.raises(UserError, match="learnable_property"):
        train(tmp_path / "parts", pictures, resume_from_checkpoint="latest", learnable_property="style")


def test_command_writes_a_word_that_the_model_reads(tmp_path, model, pictures, untouched):
    command(model, pictures, tmp_path, "--num-vectors", 2, "--learnable-property", "style")
    assert (tmp_path / "samples" / "step-000002.png").is_file()
    (vectors,) = load_file(tmp_path / "model" / "learned_embeds.safetensors").values()
    assert vectors.shape == (2, 16)
    sd = pipeline()
    sd.load_textual_inversion(tmp_path / "model")
    (ids,) = sd.tokenizer.encode(["red <cat>"])
    assert ids[-2:] == list(sd.tokenizer.added_tokens.values())

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="earlier run.*--resume-from-checkpoint latest"):
        command(model, pictures, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_bad_calls(tmp_path, pictures, untouched):
    cases = [
        ({"learnable_property": "mood"}, "learnable_property 'mood': unknown; use object or style"),
        ({"num_vectors": 11}, "num_vectors 11: a prompt has room for 1 to 10"),
        ({"num_vectors": 0}, "num_vectors 0"),
        ({"placeholder_token": "a"}, "'a': is in the vocabulary already"),
    ]
    source = FolderSource(pictures, 16, need_captions=False)
    for options, told in cases:
        with pytest.raises(UserError, match=told):
            train_textual_inversion(
                Settings(tmp_path / "run"), untouched, source, **{"placeholder_token": "<cat>", **options}
            )
    assert untouched.text_encoder.embeddings.learned_embedding is None and not (tmp_path / "run").exists()


def test_other_words_are_not_trained_along(tmp_path, pictures):
    sd = pipeline()
    sd.add_tokens({"<dog>": np.zeros((1, 16))})
    with pytest.raises(UserError, match="has words added to it.*save it and load that"):
        train_textual_inversion(
            Settings(tmp_path), sd, FolderSource(pictures, 16, False), placeholder_token="<cat>"
        )


def command(model, pictures, output, *options):
    """Runs the command as the command line does."""
    arguments = ["--pretrained-model-name-or-path", model, "--train-data-dir", pictures]
    arguments += ["--placeholder-token", "<cat>", "--output-dir", output, "--max-train-steps", 2]
    arguments += ["--train-batch-size", 2, "--num-inference-steps", 2, "--num-validation-images", 2]
    arguments += ["--no-jit-compile", *options]
    textual_inversion.main(list(map(str, arguments)), standalone_mode=False)


def refused(monkeypatch, capsys, *arguments):
    """The line that the real command ends with, which leaves with exit code 2."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "argv", ["textual-inversion", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(textual_inversion, "textual-inversion")
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and sum("error" in line for line in lines) == 1
    return lines[-1]


def test_bad_input_is_one_line_before_long_work(tmp_path, model, pictures, monkeypatch, capsys):
    empty, broken = tmp_path / "empty", write_pictures(tmp_path / "broken", 3, 0)
    empty.mkdir()
    picture = broken / "1.png"
    picture.write_bytes(picture.read_bytes()[:-20])
    run, token = tmp_path / "run", ("--placeholder-token", "<cat>")
    data = ("--train-data-dir", pictures)
    opened = (*data, "--pretrained-model-name-or-path", model)
    cases = [
        (token, "--train-data-dir: missing"),
        ((*token, "--train-data-dir", empty), "empty: no images"),
        ((*token, "--train-data-dir", broken), "1.png: truncated"),
        ((*token, "--train-data-dir", tmp_path / "none"), "none: no such folder"),
        (data, "--placeholder-token"),
        ((*token, *data, "--num-vectors", "0"), "--num-vectors"),
        ((*token, *data, "--learnable-property", "mood"), "--learnable-property"),
        ((*opened, "--placeholder-token", "a"), "'a': is in the vocabulary already"),
        ((*opened, "--placeholder-token", "my cat"), "'my cat': empty, or with a space"),
        ((*opened, *token, "--num-vectors", "20"), "room for 1 to 10"),
    ]
    for arguments, told in cases:
        assert told in refused(monkeypatch, capsys, "--output-dir", run, *arguments)
    assert not [path for path in run.iterdir() if path.name != ".lock"]
