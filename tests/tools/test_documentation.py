"""What the documentation says holds: links lead somewhere, commands are understood, figures were measured."""

import json
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest

import keras_sd
from keras_sd.cli.main import cli
from keras_sd.cli.train.main import train
from keras_sd.data.emoji.source import load_emoji
from keras_sd.diffusion.samplers import SAMPLERS
from keras_sd.files.image_files import read_parameters, save_png
from keras_sd.weights.lora_updates import LowRank
from keras_sd.weights.lora_writing import write_lora
from keras_sd.weights.textual_inversion import write_embeddings
from tests.programs import run_python
from tools import draw_architecture, migration_tables

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md")),
    ROOT / "notebooks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SETTING = re.compile(r"[A-Z_]+=\S*")
PROGRAMS = {"keras-sd": cli, "python -m keras_sd.train": train, "python -m keras_sd": cli}


def prose(page):
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def blocks(page, language):
    return [code for name, code in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def code_of(page):
    """The lines of all shell blocks, continued ones joined, and the spans of code in the text."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return lines + SPAN.findall(prose(page))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = (title.lower() for title in HEADING.findall(prose(page)))
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", (*PAGES, *NOTEBOOKS), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for address in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", address):
            continue
        path, _, anchor = address.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), address
        assert not anchor or anchor in anchors(target), address


def commands(page):
    """The commands of ours on a page: (program, arguments), without what stands for more."""
    for line in code_of(page):
        words = [word for word in shlex.split(line, comments=True) if word != "…"]
        while words and SETTING.fullmatch(words[0]):
            words.pop(0)
        for program in PROGRAMS:
            length = len(program.split())
            if " ".join(words[:length]) == program and len(words) > length:
                yield program, words[length:]
                break


def parse(command, arguments, parent=None):
    """Has click read the arguments and does nothing with them."""
    if not isinstance(command, click.Group):
        command.make_context(command.name, list(arguments), parent=parent)
        return
    if arguments[0] in {flag for option in command.params for flag in option.opts}:
        return  # --version
    if command is train and arguments[0].startswith("-"):
        arguments = ["text-to-image", *arguments]
    name, *others = arguments
    assert name in command.commands, f"no command {name}"
    parse(command.commands[name], others, click.Context(command, info_name=command.name, parent=parent))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program, arguments in commands(page):
        if "--config-file" in arguments:  # the page's own
            path = Path(arguments[arguments.index("--config-file") + 1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(next(text for text in blocks(page, "toml") if "[run]" in text), encoding="utf-8")
        try:
            parse(PROGRAMS[program], arguments)
        except click.exceptions.Exit:
            pass  # --help
        except click.MissingParameter:
            # A command that is only named, or an option of it, stands without what it is to work on.
            words = [word for word in arguments if not word.startswith("-")]
            is_group = isinstance(PROGRAMS[program].commands[words[0]], click.Group)
            assert len(words) == 1 + is_group, (program, arguments)
        except click.UsageError as error:
            pytest.fail(f"{program} {shlex.join(arguments)}: {error.format_message()}")


def test_commands_are_found():
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 60
    with pytest.raises(click.NoSuchOption):
        parse(cli, ["generate", "red heart", "--colour", "red"])
    with pytest.raises(click.MissingParameter):
        parse(train, ["textual-inversion", "--num-vectors", "4"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_and_scripts_exist(page):
    targets = set(
        re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    for line in code_of(page):
        named = set(re.findall(r"^make ([a-z][a-z-]*)", line))
        assert named <= targets, line
        for script in re.findall(r"\b(?:tools|tests)/[\w/]+\.py\b", line):
            assert (ROOT / script).is_file(), line


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_name_what_exists(notebook):
    text = notebook.read_text(encoding="utf-8")
    named = re.findall(r"`(docs/[\w-]+\.md)`", text)
    named += [f"benchmarks/{name}" for name in re.findall(r'"benchmarks" / "([^"]+)"', text)]
    for path in named:
        assert (ROOT / path).is_file(), path


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder: files of all names that the README's commands are given."""
    photo = load_emoji()[0].load(64)
    save_png(photo, tmp_path / "photo.png")
    save_png(photo, tmp_path / "small.png")
    mask = np.zeros((64, 64, 3), "uint8")
    mask[16:48, 16:48] = 255
    save_png(mask, tmp_path / "mask.png")
    down, up = np.ones((1, 176), "float32"), np.full((176, 1), 1e-3, "float32")
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    (tmp_path / "loras").mkdir()
    write_lora(tmp_path / "loras" / "ink.safetensors", {"unet": {layer: LowRank(down, up, 1.0)}})
    write_embeddings(tmp_path / "learned_embeds.safetensors", {"<cat>": np.ones((2, 128), "float32")})
    pictures = tmp_path / "images"
    pictures.mkdir()
    for index, emoji in enumerate(load_emoji()[:4]):
        save_png(emoji.load(64), pictures / f"{index}.png")
    (tmp_path / "phrases.txt").write_text("grinning face\nred heart\nby Claude Monet\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


HOW_TO = ROOT / "docs" / "how-to.md"


def test_commands_of_the_tasks(workplace):
    # The others need a model of the hub, a run or LoRAs of one's own, or train, or are run by the next test.
    elsewhere = re.compile(
        r"v1-5|x4-upscaler|sd-1\.5|convert|caption|evaluate|export|dataset|encode|^(plot|ema|lora) "
    )
    found = [*commands(ROOT / "README.md"), *commands(HOW_TO)]
    found = [arguments for program, arguments in found if program == "keras-sd"]
    found = [arguments for index, arguments in enumerate(found) if arguments not in found[:index]]
    found = [arguments for arguments in found if not elsewhere.search(" ".join(arguments))]
    tasks = {"generate", "image-to-image", "inpaint", "upscale", "walk", "reconstruct", "presets"}
    assert {task for task, *_ in found} == tasks and len(found) >= 10
    for arguments in found:
        # Images made once do not need XLA, and those that are not looked at below need few steps.
        more = ["--no-jit-compile"] if arguments != ["presets"] else []
        if arguments[0] not in ("presets", "reconstruct") and "--num-images" not in arguments:
            more += ["--num-inference-steps", "4"]
        cli.main([*arguments, *more], standalone_mode=False)
    for index in range(4):
        said = read_parameters(workplace / f"heart-{index}.png")
        assert (said["prompt"], said["Seed"], said["Steps"]) == ("red heart", str(index), "30")


def test_folder_of_images_becomes_a_model_by_the_commands_of_the_page(workplace):
    page = ROOT / "docs" / "captions.md"
    text = page.read_text(encoding="utf-8")
    to_clip, its_clip = re.findall(r"connection, .*: `keras-sd (.*)`, then\n`(--clip .*)`", text)[0]
    caption, train_lora = next(
        block.splitlines() for block in blocks(page, "bash") if "keras-sd caption images" in block
    )
    quick = "--max-train-steps 1 --no-jit-compile --kid-images 0 --train-batch-size 1 --num-inference-steps 1"
    caption = shlex.join(shlex.split(caption, comments=True))
    cli.main(shlex.split(to_clip), standalone_mode=False)
    _, *arguments = shlex.split(f"{caption} {its_clip}")
    run_python(["-m", "keras_sd", *arguments])  # whose models are torch's
    *program, arguments = f"{train_lora} {quick}".split(maxsplit=3)
    PROGRAMS[" ".join(program)].main(shlex.split(arguments), standalone_mode=False)
    captions = (workplace / "images/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(captions) == 4 and "Monet" not in "".join(captions)
    of_data = [arguments for _, arguments in commands(HOW_TO) if arguments[0] in ("dataset", "encode")]
    for arguments in of_data:
        cli.main(arguments, standalone_mode=False)
    assert len(of_data) == 2 and list(workplace.glob("encodings/*.arrayrecord"))
    assert (workplace / "dataset.png").is_file()
    assert list(workplace.glob("runs/*/model/*.safetensors"))


@pytest.mark.parametrize("name", ["getting-started", "formats"])
def test_python_of_short_pages(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs" / f"{name}.md", "python")
    quick = 'from_preset("emoji", jit_compile=False)'
    exec(code.replace('from_preset("emoji")', quick), {})
    (image,) = tmp_path.glob("*.png")
    shown = {"getting-started": ("grid.png", ""), "formats": ("heart.png", "3\n")}
    assert (image.name, capsys.readouterr().out) == shown[name]


def test_python_of_the_pages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (first,) = blocks(ROOT / "README.md", "python")
    code = first + blocks(ROOT / "docs" / "models.md", "python")[1]
    promised = re.findall(r"^(?:(\w+) = .*)?# (\w+) (\([\d, ]+\))", code, re.MULTILINE)
    promised = [(name or "images", dtype, shape) for name, dtype, shape in promised]
    assert [name for name, *_ in promised] == ["images", "images", "context", "latents", "decoded"]
    names = {}
    # XLA's images are compared elsewhere.
    exec(code.replace('from_preset("emoji")', 'from_preset("emoji", jit_compile=False)'), names)
    for name, dtype, shape in promised:
        assert (str(names[name].dtype), str(names[name].shape)) == (dtype, shape)
    (provenance,) = blocks(ROOT / "docs/responsible-use.md", "python")
    exec(provenance, names)
    assert json.loads((tmp_path / "my-model/model_index.json").read_text())["_class_name"]
    said = read_parameters(tmp_path / "heart.png")
    assert said["prompt"] == "red heart" and said["Seed"] == "3" and len(said["Model hash"]) == 10


@pytest.mark.parametrize("name", ["README.md", "docs/model-card-emoji.md", "docs/results.md"])
def test_figures_of_the_bundled_model_are_the_measured_ones(name):
    figures = json.loads((ROOT / "benchmarks/emoji-evaluation.json").read_text(encoding="utf-8"))
    text = (ROOT / name).read_text(encoding="utf-8")
    forms = {
        "reconstruction_psnr": "{:.1f} dB",
        "reconstruction_edge_energy": "{:.1%}",
        "training_top1": "{:.1%}",
        "training_edge_energy": "{:.1%}",
        "held_out_concept": "{:.1%}",
        "held_out_variant": "{:.1%}",
        "kid": "{:.4f}",
        "kid_floor": "{:.4f}",
        "generation_seconds": "{:.2f} s",
    }
    for key, form in forms.items():
        assert form.format(figures[key]) in text, key


def test_samplers_are_listed():
    rows = re.findall(
        r"^\| `(\w+)` \| (.+) \| (.+) \|$", (ROOT / "docs/samplers.md").read_text(), re.MULTILINE
    )
    assert rows == [(key, sampler.name, sampler.purpose) for key, sampler in SAMPLERS.items()]


def test_figures_of_fewer_evaluations_are_the_measured_ones():
    rows = json.loads((ROOT / "benchmarks/fewer-evaluations.json").read_text(encoding="utf-8"))["rows"]
    text = (ROOT / "docs/samplers.md").read_text(encoding="utf-8")
    for row in rows:
        figures = (
            f"{row['time_ratio']:.2f} ×",
            f"{row['mean_absolute_difference']:.3f}",
            f"{row['kid']:.3f}",
            f"{row['training_top1']:.1%}",
            f"{row['held_out_concept']:.1%}",
            f"{row['held_out_variant']:.1%}",
        )
        assert f"| {row['way']} | {' | '.join(figures)} |" in text


def test_figures_of_lower_precisions_are_the_measured_ones():
    rows = json.loads((ROOT / "benchmarks/precision-cost.json").read_text(encoding="utf-8"))["rows"]
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert len(rows) == 4
    for row in rows:
        figures = f"{row['weight_bytes'] / 1e6:.1f} MB", f"{row['kid']:.4f}", f"{row['clip_score']:.2f}"
        assert f" | {' | '.join(figures)} | " in text


def test_the_diagram_is_that_of_the_imports():
    imports = draw_architecture.read_imports()
    assert imports["pipeline"] >= {"weights", "diffusion"} and "pipeline" not in imports["training"]
    assert draw_architecture.OUTPUT.read_text(encoding="utf-8") == draw_architecture.draw(imports)


def test_migration_page_says_what_commands_answer():
    assert migration_tables.PAGE.read_text(encoding="utf-8") == migration_tables.page()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the documentation as HTML, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    recipe = re.search(r"python -m (sphinx .*) -d \S+ \. \S+ \$\(ARGS\)", (ROOT / "Makefile").read_text())[1]
    assert "-W" in recipe.split()
    run_python(
        ["-m", *recipe.split(), "-d", folder / "trees", ROOT, folder / "html"], "tensorflow"
    )  # for TFDS
    return folder / "html"


def test_site_has_every_page(site):
    index = (site / "index.html").read_text(encoding="utf-8")
    for page in PAGES:
        name = page.relative_to(ROOT).with_suffix(".html").as_posix()
        assert (site / name).is_file(), name
        assert name == "README.html" or f'href="{name}"' in index, name
    assert 'src="_images/grid.png"' in index and (site / "_images/grid.png").is_file()


def test_site_has_all_names_modules_and_commands(site):
    public = (site / "docs/reference/public.html").read_text(encoding="utf-8")
    missing = {name for name in keras_sd.__all__ if f'id="keras_sd.{name}"' not in public}
    assert missing == {"__version__", "SAMPLERS"}  # constants
    modules = "".join(page.read_text(encoding="utf-8") for page in site.glob("docs/reference/modules/*.html"))
    for path in (ROOT / "keras_sd").glob("*/**/*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert f'id="module-{name}"' in modules or name.startswith("keras_sd.cli"), name
    commands = (site / "docs/reference/commands.html").read_text(encoding="utf-8")
    for name in ("keras-sd generate", "keras-sd lora merge", "keras-sd train text-to-image"):
        assert f">{name}<a" in commands
