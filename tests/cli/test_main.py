import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_sd.cli import main as cli
from keras_sd.cli.demo import run_demo
from keras_sd.files.image_files import read_parameters
from tests import tiny
from tests.programs import Program

# Any import of a backend, or of Keras, which brings one, ends in an ImportError.
WITHOUT_BACKEND = """
import sys
for name in ("keras", "tensorflow", "jax"):
    sys.modules[name] = None
from keras_sd.cli.main import main
"""


def run_python(code, *arguments, **options):
    """Runs code in an interpreter of its own: (exit code, standard output, standard error)."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def keras_sd_command(run_program):
    """Runs a command in this process, which has its backend loaded, with the same three results.

    Images are made without XLA, which those that are made once or twice do not pay for.
    """
    makes_images = {
        name
        for name, command in cli.cli.commands.items()
        if any("--no-jit-compile" in parameter.secondary_opts for parameter in command.params)
    }

    def run(command, *arguments):
        option = ["--no-jit-compile"] if command in makes_images else []
        return run_program(cli.main, command, *option, *arguments)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder)
    return folder


def test_help_needs_no_backend():
    code, output, errors = run_python(WITHOUT_BACKEND + "main()", "--help")
    assert (code, errors) == (0, "")
    assert all(command in output for command in ("generate", "evaluate", "train", "demo", "presets"))


def test_presets_are_listed_with_licence_and_source():
    code, output, _ = run_python(WITHOUT_BACKEND + "main()", "presets")
    assert code == 0
    assert ["emoji", "CC-BY-4.0", "bundled"] in [line.split() for line in output.splitlines()]


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "keras_sd", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("keras-sd, version 0.2.0")


def test_names_that_are_no_utf8_are_told_as_they_are():
    script = """if True:
        import click, os
        from keras_sd.cli.program import run_command
        run_command(click.Command("x", callback=lambda: click.echo(os.fsdecode(b"caf\\xe9"))), "x")
    """
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"caf\xe9\n"), done.stderr


LONG = "x" * 300

BAD_INPUT = [
    ("paint", "'paint'", "keras-sd --help"),
    ("train paint", "'paint'", "keras-sd train --help"),
    ("train clip --train-batch-size many", "'--train-batch-size'", "keras-sd train clip --help"),
    ("train --max-train-step few", "'--max-train-step'", "keras-sd train text-to-image --help"),
    ("generate", "PROMPT", "keras-sd generate --help"),
    ("generate heart --num-inference-steps 0", "'--num-inference-steps'", "x>=1"),
    (
        "generate heart --num-inference-steps 5000",
        "--num-inference-steps 5000: out of range",
        "use 1 to 1000",
    ),
    (
        "upscale taken.png --num-inference-steps 5000",
        "--num-inference-steps 5000: out of range",
        "use 1 to 1000",
    ),
    ("evaluate --num-inference-steps 5000", "--num-inference-steps 5000: out of range", "use 1 to 1000"),
    ("generate heart --guidance-scale nan", "'--guidance-scale'", "finite number"),
    ("generate heart --guidance-interval 0 nan", "'--guidance-interval'", "finite number"),
    ("generate heart --guidance-rescale nan", "'--guidance-rescale'", "finite number"),
    ("generate heart --eta nan", "'--eta'", "finite number"),
    ("image-to-image taken.png heart --strength nan", "'--strength'", "finite number"),
    ("walk a --frame-rate nan", "'--frame-rate'", "finite number"),
    ("generate heart --seed 18446744073709551616", "'--seed'", "0<=x<=18446744073709551615"),
    ("generate heart --lora taken.safetensors:nan", "--lora taken.safetensors:nan", "another weight"),
    ("generate heart --sampler magic", "'magic'", "ddim"),
    ("generate heart --model emojis", "'emojis'", "emoji"),
    ("generate heart --num-images 0", "'--num-images'", "1<=x<=100000"),
    ("generate heart --num-images 1000000000000", "'--num-images'", "1<=x<=100000"),
    ("image-to-image taken.png heart --height 16777216 --width 16777216", "'--height'", "8<=x<=16384"),
    ("generate heart --eta 1.5", "'--eta'", "0<=x<=1"),
    ("generate heart --output heart.jpg", "heart.jpg", "heart.png"),
    ("generate heart --output .", ".: is a folder", "name a .png file"),
    ("generate heart --output file/heart.png", "file/heart.png", "choose another place"),
    ("generate heart --output /proc/heart.png", "/proc/heart.png", "choose another place"),
    (f"generate heart --output {LONG}.png", "File name too long", "choose another place"),
    (f"generate heart --output new/{LONG}/heart.png", "File name too long", "choose another place"),
    ("generate heart --output new/heart.png/", "new/heart.png/: is a folder", "name a .png file"),
    ("generate heart --output taken.png", "taken.png: exists", "--overwrite"),
    ("generate heart --output more.png --num-images 2", "more-1.png: exists", "--overwrite"),
    ("image-to-image taken.png heart --output taken.png", "taken.png: exists", "--overwrite"),
    ("inpaint taken.png white.png heart --output taken.png", "taken.png: exists", "--overwrite"),
    ("upscale taken.png --output taken.png", "taken.png: exists", "--overwrite"),
    ("walk a b --output taken.gif", "taken.gif: exists", "--overwrite"),
    ("reconstruct taken.png --output taken.png", "taken.png: exists", "--overwrite"),
    ("evaluate --output taken.json", "taken.json: exists", "--overwrite"),
    ("convert emoji taken.safetensors", "taken.safetensors: exists", "--overwrite"),
    ("convert emoji folder", "folder: exists", "--overwrite"),
    ("convert emoji new --report taken.json", "taken.json: exists", "--overwrite"),
    (f"convert emoji {LONG}", "File name too long", "choose another place"),
    ("caption folder --contact-sheet taken.png", "taken.png: exists", "remove it"),
    ("demo --output-dir file", "file: is a file", "choose another place"),
    ("demo --output-dir folder", "folder: exists", "--overwrite"),
    ("demo --output-dir folder --overwrite", "folder: holds something else", "another folder"),
    (f"generate heart --model {LONG}", "ame too long", "shorter name"),
    (f"generate heart --lora {LONG}", "ame too long", "shorter name"),
    (f"generate heart --lora-folder {LONG}", "ame too long", "shorter name"),
    (f"generate heart --embedding {LONG}", "ame too long", "shorter name"),
    (f"reconstruct {LONG}.png", "ame too long", "name"),
    (f"evaluate {LONG}", "ame too long", "shorter name"),
    (f"convert {LONG} new", "ame too long", "shorter name"),
    (f"caption {LONG}", "ame too long", "shorter name"),
    ("image-to-image heart.png", "PROMPT", "keras-sd image-to-image --help"),
    ("image-to-image none.png heart", "none.png", "no such image file"),
    ("image-to-image file heart", "file: not an image", "replace it by PNG"),
    ("inpaint file file heart --strength 2", "'--strength'", "0<x<=1"),
    ("inpaint file file heart --strength 0", "'--strength'", "0<x<=1"),
    ("image-to-image file heart --strength 0.01", "strength 0.01: leaves none of 30 steps", "use 0.034"),
    ("generate heart --guidance-interval 0.5", "requires 2 arguments", "see keras-sd generate --help"),
    ("generate heart --guidance-interval 0.5 0.5", "(0.5, 0.5): not a part", "use two fractions"),
    ("upscale none.png", "none.png", "add it"),
    ("generate heart --height 100 --width 70", "height 100: does not fit the model", "multiple of 8"),
    ("walk heart --height 64 --width 70", "width 70: does not fit the model", "multiple of 8"),
    ("image-to-image odd.png heart --height 64 --width 65", "width 65: does not fit", "multiple of 8"),
    ("inpaint odd.png taken.png heart --height 70 --width 64", "height 70: does not fit", "multiple of 8"),
    ("inpaint taken.png taken.png heart", "taken.png: has no white", "paint white"),
    ("inpaint taken.png mask.png heart", "mask.png: is 20x20, the image 16x16", "scale it"),
    ("upscale taken.png --negative-prompt a", "--negative-prompt: has no effect", "leave it out"),
    ("upscale taken.png --guidance-scale 2", "--guidance-scale: has no effect", "leave it out"),
    ("upscale taken.png --lora a.safetensors", "--lora: has no effect", "leave it out"),
    ("generate heart --model models/x.safetensors", "'models/x.safetensors': no such file", "check its path"),
    ("generate heart --guidance-scale -1", "'--guidance-scale'", "x>=0"),
    ("generate heart --guidance-scale inf", "'--guidance-scale'", "finite number"),
    ("generate heart --batch-size 0", "'--batch-size'", "x>=1"),
    ("generate heart --lora none.safetensors", "none.safetensors", "give a file"),
    ("generate heart --lora-folder file", "--lora-folder file: is no folder", "name the one"),
    ("generate heart --lora taken.safetensors", "taken.safetensors: truncated or no safetensors", "fetch"),
    ("generate heart --vae emoji", "--vae emoji: no such file", "correct the path"),
    ("generate heart --model emoji-upscaler", "is an upscaler", "use the command upscale"),
    ("reconstruct taken.png --model emoji-upscaler", "is an upscaler", "use the command upscale"),
    ("generate heart --eta 0.5 --sampler euler", "--eta 0.5: Euler takes none", "use 0"),
    ("upscale taken.png --eta 0.5 --sampler euler", "--eta 0.5: Euler takes none", "use 0"),
    ("upscale taken.png --model emoji", "--model emoji: is no upscaler", "use emoji-upscaler"),
    ("upscale taken.png --noise-level 5000", "--noise-level 5000: out of range", "from 0 to"),
    ("walk a b c --num-frames 2", "--num-frames 2: fewer than the 3 prompts", "use more"),
    ("walk a b --output w.png --frame-rate 5", "--frame-rate: has no effect on a PNG", "leave it out"),
    ("generate a --guidance-scale 1 --negative-prompt b", "--negative-prompt: has no effect", "leave it out"),
    ("generate a --guidance-scale 0.5 --guidance-rescale 0.7", "--guidance-rescale: has no", "leave it out"),
    ("walk a --guidance-scale 1 --guidance-interval 0 0.5", "--guidance-interval: has no", "leave it out"),
    ("evaluate --guidance-scale 1 --guidance-interval 0 0.5", "--guidance-interval: has no", "leave it out"),
    ("reconstruct taken.png --lora a.safetensors", "--lora: has no effect", "leave it out"),
    ("reconstruct taken.png --lora-folder folder", "--lora-folder: has no effect", "leave it out"),
    ("reconstruct taken.png --quantize int8", "--quantize: has no effect", "leave it out"),
    ("reconstruct taken.png --embedding a.pt", "--embedding: has no effect", "leave it out"),
    ("caption folder --mode caption --clip x/y", "--clip: has no effect with --mode caption", "leave it out"),
    ("caption folder --mode caption --flavors file", "--flavors: has no effect", "leave it out"),
    ("caption folder --mode caption --max-phrases 3", "--max-phrases: has no effect", "leave it out"),
    ("caption folder --mode classic --max-phrases 3", "--max-phrases: has no effect", "leave it out"),
    ("caption folder --negative file", "--negative: has no effect with --mode best", "leave it out"),
    ("caption folder --keywords 3", "--keywords: has no effect without --introductions", "leave it out"),
    ("generate heart --lora-folder nowhere", "nowhere", "give a file"),
    ("reconstruct none.png", "none.png", "add it"),
    ("walk", "PROMPTS", "keras-sd walk --help"),
    ("walk a b --output walk.mp4", "walk.mp4: not a .gif or .png file", "walk.gif"),
    ("generate heart --model none.ckpt", "'none.ckpt'", "emoji"),
    ("evaluate emojis", "'emojis'", "emoji"),
    ("evaluate --output file/results.json", "file/results.json", "choose another place"),
    ("demo --output-dir file/demo", "file/demo", "choose another place"),
]

# One process takes them all, as its start is what takes long.
ALL_BAD_INPUT = """
import contextlib, io, json
answers = {}
for line in json.loads(sys.argv[1]):
    sys.argv = ["keras-sd", *line.split()]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                main()
            except SystemExit as end:
                answers[line] = end.code, output.getvalue(), errors.getvalue()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers_to_bad_input(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad-input")
    (folder / "file").write_text("not a folder")
    (folder / "folder").mkdir()
    (folder / "folder" / "kept.txt").write_text("kept")
    for name in ("taken.png", "taken.gif", "taken.json", "taken.safetensors", "more-1.png"):
        Image.new("RGB", (16, 16)).save(folder / name, "PNG")
    Image.new("RGB", (100, 70)).save(folder / "odd.png")
    Image.new("L", (20, 20), 255).save(folder / "mask.png")
    Image.new("L", (16, 16), 255).save(folder / "white.png")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    lines = json.dumps([row[0] for row in BAD_INPUT])
    code, output, errors = run_python(WITHOUT_BACKEND + ALL_BAD_INPUT, lines, cwd=folder)
    assert code == 0, errors
    # Nothing is written, and no folder made.
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["folder"]
    return json.loads(output)


@pytest.mark.parametrize("arguments, thing, remedy", BAD_INPUT)
def test_bad_input_is_one_line_before_a_backend_is_loaded(arguments, thing, remedy, answers_to_bad_input):
    code, output, errors = answers_to_bad_input[arguments]
    assert (code, output) == (2, "")
    assert errors.startswith("keras-sd: error: ") and errors.count("\n") == 1
    assert thing in errors and remedy in errors


def test_unknown_backend_is_one_line():
    code = "import os; os.environ['KERAS_BACKEND'] = 'numpy'; from keras_sd.cli.main import main; main()"
    code, _, errors = run_python(code, "presets")
    assert code == 2
    assert errors == "keras-sd: error: KERAS_BACKEND 'numpy': unknown; use tensorflow or jax\n"


@pytest.mark.parametrize(
    "body, code, last_line",
    [
        ("pass", 0, ""),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, ""),
        ("warnings.warn('a thing:\\nfault')", 0, "program: warning: a thing: fault"),
        ("raise UserError('a thing: at\\nfault; mend it')", 2, "program: error: a thing: at fault; mend it"),
        (
            "open('/dev/full', 'w', buffering=1).write('more\\n')",
            2,
            "program: error: No space left on device; free the space or choose another place",
        ),
        ("open('none/file')", 2, "program: error: none/file: No such file or directory; check the name"),
        ("os.mkdir('/proc/new')", 2, "program: error: /proc/new: No such file or directory; check the name"),
        ("raise RuntimeError('a fault of ours')", 1, "RuntimeError: a fault of ours"),
    ],
)
def test_exit_codes(body, code, last_line):
    program = f"""if True:
        import os, signal, time, warnings
        import click
        from keras_sd.cli.program import run_command
        from keras_sd.errors import UserError

        # A shell that starts jobs in the background has them ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        @click.command()
        def command():
            {body}

        run_command(command, "program")
    """
    exit_code, _, errors = run_python(program)
    assert exit_code == code
    assert errors.strip().split("\n")[-1] == last_line


def test_one_picture_says_how_it_was_made(keras_sd_command, model, tmp_path):
    path = tmp_path / "new" / "heart.png"
    options = (
        "--num-inference-steps",
        3,
        "--seed",
        5,
        "--guidance-scale",
        2.5,
        "--eta",
        0.5,
        "--reuse-interval",
        2,
        "--negative-prompt",
        "a, b: c",
    )
    code, output, _ = keras_sd_command("generate", "red heart", "--output", path, "--model", model, *options)
    assert (code, output.strip()) == (0, str(path))
    parameters = read_parameters(path)
    assert len(parameters.pop("Model hash")) == 10
    assert parameters == {
        "prompt": "red heart",
        "negative_prompt": "a, b: c",
        "Steps": "3",
        "Sampler": "DDIM",
        "CFG scale": "2.5",
        "Seed": "5",
        "Size": "16x16",
        "Eta": "0.5",
        "Reuse interval": "2",
        "Model": str(model),
    }


def test_several_pictures_are_a_sheet_and_single_files(keras_sd_command, model, tmp_path):
    options = (
        "--output",
        tmp_path / "hearts.png",
        "--model",
        model,
        "--num-inference-steps",
        2,
        "--num-images",
        3,
    )
    code, output, _ = keras_sd_command("generate", "blue heart", *options, "--guidance-scale", 1)
    assert code == 0
    names = ["hearts.png", "hearts-0.png", "hearts-1.png", "hearts-2.png"]
    assert output.split() == [str(tmp_path / name) for name in names]
    sheet, *singles = (np.asarray(Image.open(tmp_path / name)) for name in names)
    assert np.stack(singles).shape == (3, 16, 16, 3) and len(np.unique(singles, axis=0)) == 3
    assert min(sheet.shape[:2]) > 16
    assert [read_parameters(tmp_path / name)["Seed"] for name in names] == ["0", "0", "1", "2"]


def test_what_is_there_stays_or_is_overwritten(keras_sd_command, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--model", model, "--num-inference-steps", 1, "--guidance-scale", 1)

    def generate(*more):
        code, output, errors = keras_sd_command("generate", "red heart", *options, *more)
        assert code == 0, errors
        return output.split()

    assert generate() == ["image.png"]
    first = Path("image.png").read_bytes()
    assert generate("--num-images", 2) == ["image-1.png", "image-1-0.png", "image-1-1.png"]
    Path("image-3-1.png").write_bytes(b"of someone else")
    assert generate("--seed", 1) == ["image-2.png"]
    assert generate("--num-images", 2) == ["image-4.png", "image-4-0.png", "image-4-1.png"]
    assert Path("image.png").read_bytes() == first
    assert generate("--seed", 1, "--output", "image.png", "--overwrite") == ["image.png"]
    assert Path("image.png").read_bytes() == Path("image-2.png").read_bytes() != first
    assert generate("--output", "-0.png") == ["-0.png"]
    assert not list(tmp_path.glob(".*"))
    walk = ("walk", "a", *options, "--num-frames", 2)
    assert [keras_sd_command(*walk)[1].strip() for _ in range(2)] == ["walk.gif", "walk-1.gif"]


ON_A_FULL_DISK = """if True:
    import resource
    from keras_sd.cli.main import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    main()
"""


def test_a_full_disk_is_one_line_and_leaves_the_earlier_image(model, picture, tmp_path):
    (tmp_path / "output").mkdir()
    for name in ("image.png", "walk.gif"):
        (tmp_path / "output" / name).write_text("earlier")
    commands = {
        "image.png": ["reconstruct", picture, "--height", 64, "--width", 64],
        "walk.gif": ["walk", "heart", "--num-inference-steps", 1, "--num-frames", 4],
    }
    for name, arguments in commands.items():
        path = tmp_path / "output" / name
        arguments += ["--model", model, "--output", path, "--overwrite"]
        done = Program(["-c", ON_A_FULL_DISK, *arguments], KERAS_SD_CACHE="").finish()
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == (
            f"keras-sd: error: {path}: cannot be written (File too large); "
            "free some space or choose another place"
        )
    files = {path.name: path.read_text() for path in (tmp_path / "output").iterdir()}
    assert files == {"image.png": "earlier", "walk.gif": "earlier"}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_ends_a_command_leaves_the_earlier_image_and_nothing_else(model, tmp_path, number, code):
    (tmp_path / "image.png").write_text("earlier")
    options = [
        "--model",
        model,
        "--output",
        tmp_path / "image.png",
        "--overwrite",
        "--num-inference-steps",
        500,
    ]
    program = Program(["-m", "keras_sd", "generate", "heart", *options, "--num-images", 999])
    while program.is_running() and "step/s" not in program.printed():
        time.sleep(0.05)
    program.send(number)
    done = program.finish()
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"image.png": "earlier"}


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 16, 3), "uint8")
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_pictures_from_pictures(keras_sd_command, model, picture, tmp_path):
    mask = np.zeros((24, 16), "uint8")
    mask[:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ("--model", model, "--num-inference-steps", 4, "--guidance-scale", 2)
    for command, arguments in {
        "image-to-image": (picture, "red heart", "--strength", 0.5),
        "inpaint": (picture, tmp_path / "mask.png", "red heart"),
        "reconstruct": (picture,),
    }.items():
        path = tmp_path / f"{command}.png"
        arguments += options if command != "reconstruct" else options[:2]
        code, output, _ = keras_sd_command(command, *arguments, "--output", path)
        assert (code, output.strip()) == (0, str(path))
        assert np.asarray(Image.open(path)).shape == (24, 16, 3)
    assert read_parameters(tmp_path / "image-to-image.png")["Denoising strength"] == "0.5"
    inpainted = np.asarray(Image.open(tmp_path / "inpaint.png"))
    original = np.asarray(Image.open(picture))
    np.testing.assert_array_equal(inpainted[12:], original[12:])
    assert (inpainted[:12] != original[:12]).any()

    size = ("--height", 16, "--width", 32)
    path = tmp_path / "scaled.png"
    code, *_ = keras_sd_command("reconstruct", picture, *size, "--model", model, "--output", path)
    assert code == 0 and np.asarray(Image.open(path)).shape == (16, 32, 3)


def test_a_picture_is_scaled_to_what_the_model_takes(keras_sd_command, model, tmp_path):
    Image.new("RGB", (18, 27)).save(tmp_path / "odd.png")
    output, place = ("--output", tmp_path / "made.png"), tmp_path / "odd.png"
    code, _, errors = keras_sd_command("reconstruct", place, "--model", model, *output)
    assert code == 0 and Image.open(output[1]).size == (16, 24)
    assert f"{place}: 18 x 27 pixels, scaled to 16 x 24, multiples of 4\n" in errors
    # A side that is not given follows from the ratio.
    for sides, size in ((("--height", 40), (28, 40)), (("--width", 24), (24, 36))):
        code, *_ = keras_sd_command("reconstruct", place, "--model", model, *output, *sides, "--overwrite")
        assert code == 0 and Image.open(output[1]).size == size
    code, _, errors = keras_sd_command("reconstruct", place, "--model", model, *output, "--height", 18)
    assert code == 2


def test_a_picture_for_another_command_is_one_line(keras_sd_command, model, tmp_path):
    Image.new("RGB", (16, 24)).save(tmp_path / "even.png")
    code, _, errors = keras_sd_command("upscale", tmp_path / "even.png", "heart", "--model", model)
    assert code == 2 and "is no upscaler" in errors


def test_a_picture_is_made_twice_as_large(keras_sd_command, tmp_path):
    Image.new("RGB", (24, 16), "red").save(tmp_path / "small.png")
    output = tmp_path / "large.png"
    code, *_ = keras_sd_command(
        "upscale", tmp_path / "small.png", "--num-inference-steps", 1, "--output", output
    )
    assert code == 0
    large = np.asarray(Image.open(output)).astype(int)
    assert large.shape == (32, 48, 3)
    assert np.abs(large.mean(axis=(0, 1)) - (255, 0, 0)).max() < 8
    assert read_parameters(output)["Model"] == "emoji-upscaler"
    code, _, errors = keras_sd_command("upscale", tmp_path / "small.png", "red")
    assert code == 2 and "takes no prompt" in errors


def test_a_walk_is_a_gif_or_a_sheet(keras_sd_command, model, tmp_path):
    options = ("--model", model, "--num-inference-steps", 2, "--num-frames", 4)
    code, *_ = keras_sd_command(
        "walk", "red heart", "blue heart", *options, "--frame-rate", 5, "--output", tmp_path / "walk.gif"
    )
    assert code == 0
    with Image.open(tmp_path / "walk.gif") as walk:
        assert (walk.n_frames, walk.size, walk.info["duration"], walk.info["loop"]) == (4, (16, 16), 200, 0)
    code, *_ = keras_sd_command("walk", "red heart", *options, "--output", tmp_path / "walk.png")
    assert code == 0 and min(Image.open(tmp_path / "walk.png").size) > 2 * 16


def test_more_steps_than_timesteps_is_one_line(keras_sd_command, model, tmp_path):
    options = ("--output", tmp_path / "heart.png", "--model", model, "--num-inference-steps", 1001)
    code, _, errors = keras_sd_command("generate", "red heart", *options)
    assert code == 2
    assert (
        errors.strip().split("\n")[-1]
        == "keras-sd: error: --num-inference-steps 1001: out of range; use 1 to 1000"
    )


def test_evaluation_of_the_bundled_model_is_a_table_and_a_file(keras_sd_command, tmp_path):
    path = tmp_path / "results.json"
    code, output, _ = keras_sd_command("evaluate", "emoji", "--num-inference-steps", 1, "--output", path)
    assert code == 0
    results = json.loads(path.read_text())
    assert results["model"] == "emoji" and results["num_inference_steps"] == 1
    assert results["reconstruction_psnr"] > 29
    table = [line for line in output.splitlines() if line.startswith("| ")]
    assert len(table) == 13 and f"{results['reconstruction_psnr']:.2f} dB" in table[1]
    assert 0.9 < results["reconstruction_ssim"] < 1 and results["targets"]["kid_ratio"]["hoped"] == 1


def test_demo_fine_tunes_and_names_what_it_wrote(tmp_path):
    lines = []
    folder = tmp_path / "demo"
    options = {"training_images": 36, "held_out_images": 24, "num_inference_steps": 4, "jit_compile": False}
    figures = run_demo(folder, lines.append, max_train_steps=3, **options)
    assert json.loads((folder / "results.json").read_text()) == figures
    for name in ("loss", "kid"):
        before, after = figures["before"][name], figures["after"][name]
        assert np.isfinite([before, after]).all() and before != after
        assert any(f"{before:.4f}" in line and f"{after:.4f}" in line for line in lines)
    named = [Path(line.split()[0]) for line in lines if line.startswith("  ")]
    assert len(named) == 7 and all(path.exists() for path in named)
    with Image.open(folder / "upscaled.png") as sheet:
        assert sheet.width > 4 * 128 and sheet.height > 2 * 128  # four prompts in two rows, twice each
    steps = [json.loads(line) for line in (folder / "run/logs/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3]
