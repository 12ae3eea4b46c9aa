"""Conversion between formats, and the report that compares the result with its source."""

import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_sd.cli.convert import convert
from keras_sd.cli.program import run_command
from keras_sd.config import TextEncoderConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.parity import compare as parity
from keras_sd.parity.report import Report
from keras_sd.weights.checkpoint import Checkpoint, Part
from keras_sd.weights.diffusers_folder import write_folder
from keras_sd.weights.readers import read_checkpoint
from keras_sd.weights.rules import torch_state
from keras_sd.weights.safetensors_files import DTYPES
from keras_sd.weights.single_file import write_single_file
from tests import tiny

# Of CLIP's own vocabulary, as single files bring none.
TEXT_ENCODER = TextEncoderConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=12
)
MODELS = {
    "text_encoder": (TextEncoder, TEXT_ENCODER),
    "unet": (UNet, tiny.SD1_UNET),
    "vae": (AutoencoderKL, tiny.VAE),
    "image_encoder": (ImageEncoder, tiny.IMAGE_ENCODER),
}


def random_part(name, dtype):
    model_class, config = MODELS[name]
    with tiny.without_initial_values():
        model = model_class(config)
    state = torch_state(model)
    generator = np.random.default_rng(len(state))
    return Part(
        config.to_dict(),
        {
            key: (0.2 * generator.standard_normal(array.shape) + (array.ndim == 1)).astype(DTYPES[dtype])
            for key, array in state.items()
        },
        name,
    )


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Gives a model's folder in a precision."""

    def write(dtype):
        folder = tmp_path_factory.getbasetemp() / f"model-{dtype}"
        if not folder.exists():
            parts = {name: random_part(name, dtype) for name in MODELS}
            checkpoint = Checkpoint(parts, SchedulerConfig().to_dict())
            write_folder(folder, checkpoint, Tokenizer.clip().save)
        return folder

    return write


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    """A single file with an autoencoder alone."""
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    with pytest.warns(UserWarning, match="vae norm_num_groups 4"):
        write_single_file(path, Checkpoint({"vae": random_part("vae", "float32")}))
    return path


@pytest.fixture
def convert_command(monkeypatch, capsys):
    """Runs the command: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_command(convert, "convert")
        return exit_.value.code, *capsys.readouterr()

    return run


def verdicts(source, written):
    """The verdicts on all tensors of two paths, and the types of the latter's."""
    source, written = read_checkpoint(source).parts, read_checkpoint(written).parts
    assert source.keys() - {"image_encoder"} == written.keys() - {"image_encoder"}
    entries = [
        entry
        for name in written
        for entry in parity.compare_tensors(name, source[name].tensors, written[name].tensors)
    ]
    assert len(entries) > 40
    return {entry.verdict for entry in entries}, {entry.dtype for entry in entries}


def plant_code(folder):
    """Has the configs of a folder ask for a module beside them, which leaves the file that is returned."""
    marker = folder / "marker"
    for config in folder.glob("*/*config.json"):
        (config.parent / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
        names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil")
        values = json.loads(config.read_text()) | {"auto_map": names, "trust_remote_code": True}
        config.write_text(json.dumps(values))
    return marker


def test_a_model_with_a_tokenizer_of_its_own_needs_its_folder(convert_command, tmp_path):
    """The file of `emoji` is for other programs: no reader can know its words, so both sides say so."""
    single = tmp_path / "emoji.safetensors"
    code, _, errors = convert_command("emoji", single)
    assert code == 0 and "the tokenizer of 2048 tokens, without which it cannot be opened" in errors
    assert "keep the model as a folder, too" in errors
    code, _, errors = convert_command(single, tmp_path / "back")
    assert code == 2 and f"{single}: has no tokenizer" in errors and "open the diffusers folder" in errors


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_bit_for_bit(convert_command, folder_of, tmp_path, dtype):
    source, single, back = folder_of(dtype), tmp_path / "model.safetensors", tmp_path / "back"
    code, output, errors = convert_command(source, single)
    assert code == 0 and output.splitlines()[-1] == str(single)
    assert "has no place for the image encoder" in errors and "cannot hold" in errors
    assert {array.dtype.name for array in load_file(single).values()} == {dtype}
    assert convert_command(single, back)[0] == 0
    assert verdicts(source, single) == verdicts(source, back) == ({"equal"}, {dtype})
    for name in ("text_encoder", "unet", "vae"):
        (before,), (after,) = ((path / name).glob("*.safetensors") for path in (source, back))
        before, after = load_file(before), load_file(after)
        assert before.keys() == after.keys()
        assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert (back / "tokenizer/vocab.json").read_text() == (source / "tokenizer/vocab.json").read_text()


def test_parts_alone_are_converted(convert_command, folder_of, vae_file, tmp_path):
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    code, output, _ = convert_command(vae_file, folder)
    count = len(load_file(vae_file))
    assert code == 0 and output.splitlines()[0].startswith(f"vae: {count} tensors, ")
    assert sorted(path.name for path in folder.iterdir()) == ["vae"]
    assert convert_command(folder, back)[0] == 0
    before, after = load_file(vae_file), load_file(back)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)

    unet_file, unet_folder, back = tmp_path / "unet.safetensors", tmp_path / "unet", tmp_path / "unet2"
    with pytest.warns(UserWarning, match="unet norm_num_groups"):
        write_single_file(unet_file, Checkpoint({"unet": random_part("unet", "float16")}))
    assert convert_command(unet_file, unet_folder)[0] == 0
    assert convert_command(unet_folder, back, "--dtype", "float32")[0] == 0
    tensors = [read_checkpoint(path).parts["unet"].tensors for path in (unet_file, back)]
    assert {entry.verdict for entry in parity.compare_tensors("unet", *tensors)} == {"equal"}


def test_defaults_of_the_model_are_kept_or_named(convert_command, folder_of, tmp_path):
    """Otherwise the same prompt and seed would give other images."""
    source = tmp_path / "source"
    shutil.copytree(folder_of("float32"), source)
    values = {"sampling": {"guidance_scale": 2.0}, "training": {"lora": {"train_batch_size": 8}}}
    (source / "keras_sd.json").write_text(json.dumps(values))
    code, _, errors = convert_command(source, tmp_path / "folder")
    assert code == 0 and "own defaults" not in errors
    assert json.loads((tmp_path / "folder" / "keras_sd.json").read_text()) == values
    code, _, errors = convert_command(source, tmp_path / "single.safetensors")
    lost = "a single file has no place for the model's own defaults: guidance_scale 2.0, those of training"
    assert code == 0 and lost in errors
    code, _, errors = convert_command(folder_of("float32"), tmp_path / "usual.safetensors")
    assert code == 0 and "own defaults" not in errors


def test_overwriting_is_asked_for(convert_command, vae_file, tmp_path):
    path = tmp_path / "vae.safetensors"
    assert convert_command(vae_file, path, "--dtype", "float16")[0] == 0
    size = path.stat().st_size
    code, _, errors = convert_command(vae_file, path)
    assert code == 2 and f"{path}: exists; " in errors and path.stat().st_size == size
    assert convert_command(vae_file, path, "--overwrite")[0] == 0
    assert path.stat().st_size > 1.5 * size


def test_a_good_conversion_verifies(convert_command, folder_of, tmp_path):
    source, output, report = tmp_path / "source", tmp_path / "m.safetensors", tmp_path / "report.json"
    shutil.copytree(folder_of("float32"), source)
    marker = plant_code(source)
    code, printed, _ = convert_command(source, output, "--dtype", "bfloat16", "--report", report)
    assert not marker.exists()
    values = json.loads(report.read_text())
    assert code == 0 and values["passes"] and values["largest_allowed_ratio"] == 1e-4
    assert printed.splitlines()[-1] == (
        f"Good: {len(load_file(output))} tensors as they should be, "
        "all outputs within 0.0001 but for the cost of rounding."
    )
    assert len(values["notes"]) == 3 and values["versions"]["diffusers"]

    # A bfloat16 has 8 significant bits, so half of the last one is 2^-9 of the next power of two.
    stored = load_file(source / "unet/diffusion_pytorch_model.safetensors")
    assert len(values["tensors"]) == len(load_file(output))
    for tensor in values["tensors"]:
        assert tensor["verdict"] == "rounded" and tensor["dtype"] == "bfloat16"
        if tensor["part"] == "unet":
            assert 0 < tensor["difference"] <= 2**-8 * np.abs(stored[tensor["name"]]).max()

    by_source, by_library = [
        {part["output"]: part for part in values["parts"] if (part["against"] == "source") == is_source}
        for is_source in (True, False)
    ]
    assert list(by_source) == list(by_library) == ["text encoder", "UNet", "VAE encode", "VAE decode"]
    assert {part["verdict"] for part in by_source.values()} == {"cost of rounding"}
    assert all(1e-4 < part["ratio"] < 0.1 for part in by_source.values())
    assert all(part["verdict"] == "good" and part["ratio"] <= 1e-4 for part in by_library.values())
    assert by_library["UNet"]["against"].startswith("diffusers ")
    farthest = max(values["tensors"], key=lambda tensor: tensor["difference"])
    assert f"| {farthest['part']} | {farthest['name']} |" in printed


def test_a_changed_tensor_is_found(vae_file, tmp_path):
    tensors = load_file(vae_file)
    name = "first_stage_model.decoder.conv_out.bias"
    tensors[name] = tensors[name] + np.array([0, 0.5, 0], "float32")
    save_file(tensors, tmp_path / "changed.safetensors")
    good, bad = (read_checkpoint(path).parts["vae"] for path in (vae_file, tmp_path / "changed.safetensors"))
    entries = parity.compare_tensors("vae", good.tensors, bad.tensors)
    (entry,) = (entry for entry in entries if not entry.passes)
    assert (entry.name, entry.verdict) == ("decoder.conv_out.bias", "changed")
    assert entry.difference == pytest.approx(0.5)

    models = [tiny.randomize(AutoencoderKL(tiny.VAE), 3, 0.2) for _ in range(2)]
    outputs = [parity.part_outputs("vae", model) for model in models]
    assert all(output.ratio == 0 for output in parity.compare_outputs("source", *outputs))
    bias = models[1].decoder.conv_out.bias
    bias.assign(bias + np.array([0, 0.5, 0], "float32"))
    computed = parity.compare_outputs("source", outputs[0], parity.part_outputs("vae", models[1]))
    assert [output.verdict for output in computed] == ["good", "far"]
    assert computed[1].difference == pytest.approx(0.5, rel=1e-4)
    nothing = {"UNet": np.zeros((1, 4), "float32")}
    (output,) = parity.compare_outputs("source", nothing, nothing)
    assert output.verdict == "not compared: the output is the same number everywhere" and output.passes

    report = Report("a", "b", entries, computed, [], "2026-01-01", {})
    assert not report.passes and report.farthest == [entry]
    assert f"1 of {len(entries)} tensors and 1 of 2 outputs" in report.summary
    assert report.summary.endswith("the first is vae decoder.conv_out.bias.")


def test_a_missing_library_is_told_and_is_no_fault():
    array = {"UNet": np.ones(3, "float32")}
    versions = {"diffusers": "0.35.0", "transformers": None, "torch": None}
    (entry,) = parity.compare_with_libraries("none", None, {"unet": {}}, {"unet": array}, versions)
    assert (entry.output, entry.against, entry.ratio) == ("UNet", "diffusers", None)
    assert entry.verdict == "not compared: transformers and torch not installed" and entry.passes


def test_every_way_of_differing_has_its_name():
    ones = np.ones((2, 3), "float32")
    third = ones / 3
    source = {"a": ones, "b": third, "c": third, "d": ones, "e": ones, "logit_scale": ones, "z": 0 * ones}
    written = {"a": ones.astype("float16"), "b": third.astype("float16"), "e": ones.T, "f": ones}
    written |= {"c": np.nextafter(third.astype("float16"), np.float16(1)), "z": -0.0 * ones}
    entries = {entry.name: entry for entry in parity.compare_tensors("unet", source, written)}
    assert {name: entry.verdict for name, entry in entries.items()} == {
        "a": "equal",
        "b": "rounded",
        "c": "changed",
        "d": "missing",
        "e": "changed",
        "f": "not in the source",
        "logit_scale": "left out",
        "z": "changed",
    }
    assert entries["b"].difference == abs(float(np.float32(1 / 3)) - float(np.float16(1 / 3)))
    # The same numbers as a 1x1 convolution and as a linear layer.
    (entry,) = parity.compare_tensors("unet", {"k": ones[:, :, None, None]}, {"k": ones})
    assert entry.verdict == "equal"


def test_a_vae_without_encoder_verifies(convert_command, vae_file, tmp_path):
    """diffusers opens none, which is told and is no fault of the conversion."""
    decoder = {
        name: array
        for name, array in load_file(vae_file).items()
        if not name.startswith(("first_stage_model.encoder.", "first_stage_model.quant_conv."))
    }
    save_file(decoder, tmp_path / "decoder.safetensors")
    code, printed, _ = convert_command(tmp_path / "decoder.safetensors", tmp_path / "folder", "--verify")
    assert code == 0 and "| VAE decode | source | 0 |" in printed
    assert "| VAE decode | diffusers |  |  |  | not compared: diffusers opens no VAE without" in printed
    assert "VAE encode" not in printed
    assert read_checkpoint(tmp_path / "folder").parts["vae"].tensors.keys() == {
        name for name in read_checkpoint(tmp_path / "decoder.safetensors").parts["vae"].tensors
    }


def test_what_was_made_up_does_not_verify(convert_command, vae_file, tmp_path):
    tensors = load_file(vae_file)
    del tensors["first_stage_model.quant_conv.bias"]
    save_file(tensors, tmp_path / "part.safetensors")
    code, _, errors = convert_command(tmp_path / "part.safetensors", tmp_path / "none")
    assert code == 2 and "quant_conv.bias is missing" in errors and not (tmp_path / "none").exists()

    report = tmp_path / "report.md"
    options = ("--partial", "--report", report)
    code, printed, errors = convert_command(tmp_path / "part.safetensors", tmp_path / "whole", *options)
    assert code == 1 and "quant_conv.bias is missing" in errors
    assert printed.splitlines()[-1].startswith(f"FAR: 1 of {len(tensors) + 1} tensors ")
    assert "| vae | quant_conv.bias | 8 |  | float32 |  | not in the source |" in printed
    lines = report.read_text().splitlines()
    assert lines[0].startswith(f"# {tmp_path / 'part.safetensors'} as {tmp_path / 'whole'}, 20")
    assert sum(line.startswith("| vae | ") and line.count("|") == 8 for line in lines) == len(tensors) + 1
    assert printed.splitlines()[-1] == lines[-1]


@pytest.mark.parametrize(
    "arguments, thing, remedy",
    [
        ("none.ckpt model", "'none.ckpt'", "check its path"),
        ("{vae} {vae}", "vae.safetensors: belongs to the source", "choose another place"),
        ("{vae} {vae}/.. --overwrite", "belongs to the source", "choose another place"),
        ("{folder} {folder}/unet --overwrite", "unet: belongs to the source", "choose another place"),
        ("{vae} file", "file: exists", "--overwrite"),
        ("{vae} file --overwrite", "file: is a file", ".safetensors"),
        ("{vae} model.ckpt", "model.ckpt: .ckpt files are read, not written", ".safetensors file"),
        ("{vae} model.safetensor", ".safetensor resembles .safetensors", "give the folder another name"),
        ("{vae} model.safetesnors", ".safetesnors resembles .safetensors", "correct it"),
        ("{vae} file/model", "file/model: cannot be written", "choose another place"),
        ("{vae} /proc/model", "/proc/model: cannot be written", "choose another place"),
        ("{vae} /proc/model.safetensors", "cannot be written", "choose another place"),
        ("{vae} model --report report.txt", "report.txt: not a .json or .md file", "report.json"),
        ("{vae} model --dtype int8", "'--dtype'", "float16"),
        ("file model", "file", "safetensors"),
        ("text.safetensors model", "text.safetensors", "fetch it again"),
        ("{vae} model --weights best", "'--weights'", "raw"),
        ("{folder} model --variant fp8", "no such file as its fp8 weights", "diffusers"),
    ],
)
def test_bad_input_is_one_line(
    convert_command, folder_of, vae_file, tmp_path, monkeypatch, arguments, thing, remedy
):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
    arguments = arguments.format(vae=vae_file, folder=folder_of("float32"))
    code, output, errors = convert_command(*arguments.split())
    assert (code, output) == (2, "")
    assert errors.startswith("convert: error: ") and errors.count("\n") == 1
    assert thing in errors and remedy in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "text.safetensors"]
