"""Commands of pages, help texts and configs' headers: the parser takes them, nothing is run.

A command in a block is parsed whole, its settings too. One inside a sentence may be a part
("`mhe data folder --heldout-classes`"): its verb and the names of its options are looked up.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image
from typer.core import TyperCommand
from typer.main import get_command

from launcher import cli
from launcher.verbs import outputs
from mhe_dist.config.describe import all_keys
from mhe_dist.config.load import load_config
from mhe_dist.config.shipped import shipped_configs
from tools.site_verbs import verbs_page

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
INLINE = re.compile(r"`mhe ([^`]*)`")
# "Command:  mhe train NAME", "(data first: mhe data recordio ...)"; two spaces begin a remark.
HEADER = re.compile(r"^#.*?\bmhe (.+?)(?:\)|, |\s{2,}|$)", re.MULTILINE)
CONTINUED = re.compile(r" \\\n#\s+")  # a command of a header that goes on in the next line
SETTING = re.compile(r"[a-z_]+(?:\.\w+)+=")
PROGRAMS = {"mlflow": "mlflow.cli", "ray": "ray.scripts.scripts"}  # and where their commands are
STARTERS = {"mhe", "torchrun", "srun"}  # what a line may begin with that has mhe in it
KEYS = {key.path for key in all_keys()}
SECTIONS = "|".join(sorted(key.path for key in all_keys() if "." not in key.path))
NAMED_KEY = re.compile(rf"`((?:{SECTIONS})(?:\.\w+)+)(?:[:=][^`]*)?`")
# Files whose names look like keys, and a tag of MLflow.
NO_KEYS = {"train.rec", "train.idx", "model.pt", "run.json", "run.lock", "data.labels.digest"}
BASE: Any = next(each for each in TyperCommand.__mro__ if "invoke" in vars(each))


def code_lines(text: str) -> Iterator[str]:
    """Lines of indented blocks, each with the lines that a backslash joins to it."""
    text = re.sub(r"^```python\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    joined = re.sub(r"\\\n\s*", "", text)
    for line in joined.splitlines():
        if re.match(r"(?:    |\t)", line) and "mhe" in line:
            yield line


def commands(line: str) -> Iterator[list[str]]:
    """The words after `mhe` of every command of a line of shell."""
    for part in re.split(r"&&|[|;>]", re.sub(r"\s#.*", "", line)):
        words = shlex.split(part.removesuffix("&"), posix=True) if "$(" not in part else []
        names = [word.rpartition("/")[2] for word in words]
        if "mhe" in names and names[0] in STARTERS:
            yield words[names.index("mhe") + 1 :]


def block_commands() -> list[Any]:
    """Every command of a block, or of a config's header, with where it stands."""
    lines = [(path, line) for path in PAGES for line in code_lines(path.read_text())]
    found = [(path, words) for path, line in lines for words in commands(line)]
    helps = [(Path("help"), line) for line in code_lines(verbs_page())]
    found += [(path, words) for path, line in helps for words in commands(line)]
    found += [
        (path, shlex.split(match[1]))
        for path in CONFIGS
        for match in HEADER.finditer(CONTINUED.sub(" ", path.read_text()))
    ]
    named = {" ".join(words): (path, words) for path, words in found}  # each once
    return [pytest.param(words, id=f"{path.name}:{name}") for name, (path, words) in named.items()]


def inline_commands() -> list[Any]:
    """Every command inside a sentence."""
    found = [(path, match[1]) for path in PAGES for match in INLINE.finditer(path.read_text())]
    return [
        pytest.param(shlex.split(re.sub(r"\s>.*|\.\.\.", "", text)), id=f"{path.name}:{text}")
        for path, text in found
    ]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The contexts of what would have been called; the stores of examples are not asked."""
    found: list[Any] = []
    monkeypatch.setattr(outputs, "why_not_writable", lambda url: "")
    monkeypatch.setattr(BASE, "invoke", lambda self, context: found.append(context))
    return found


@pytest.mark.parametrize("words", block_commands())
def test_a_command_of_a_page_parses(
    words: list[str], parsed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(words) == 0, capsys.readouterr().err
    assert parsed or {"--help", "--version"} & set(words)


@pytest.mark.parametrize(
    "words", [case for case in block_commands() if any(map(SETTING.match, case.values[0]))]
)
def test_settings_of_a_page_are_settings(words: list[str]) -> None:
    """Those of a config that comes with mhe hold together, others are keys that there are."""
    settings = [word for word in words if SETTING.match(word)]
    for name in [word for word in words if word in shipped_configs()]:
        load_config(name, settings)
    keys = {word.partition("=")[0] for word in settings}
    assert keys <= KEYS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_a_page_names_are_keys(page: Path) -> None:
    assert set(NAMED_KEY.findall(page.read_text())) <= KEYS | NO_KEYS


@pytest.mark.parametrize("words", inline_commands())
def test_a_command_in_a_sentence_has_a_verb_and_options_that_there_are(words: list[str]) -> None:
    command = root = get_command(cli.app)
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = cli.load_verb(word) if command is root else command.commands[word]
    options = {name for parameter in command.params for name in parameter.opts}
    if hasattr(command, "commands") and "heldout" in command.commands:  # `mhe evaluate RUN`
        options |= {n for p in command.commands["heldout"].params for n in p.opts}
    written = {word for word in words if word.startswith("--")}
    assert command is not root or not words or words[0].startswith("-"), "no such verb"
    assert written <= options | {"--help"}


def program_commands() -> list[Any]:
    """Every command of a block that mlflow or ray takes, up to what it hands on."""
    found = []
    for path in PAGES:
        for line in path.read_text().replace("\\\n", "").splitlines():
            starts = re.search(r"^ {4}(?:\S+=\S+ |srun )*(?:\S*/)?(mlflow|ray) (.*)", line)
            if starts:
                words = re.split(r" -- | &(?: |$)|\s#", starts[2])[0].split()
                found.append(pytest.param(starts[1], words, id=f"{path.name}:{' '.join(words)}"))
    return found


@pytest.mark.slow  # both are large
@pytest.mark.parametrize(("program", "words"), program_commands())
def test_mlflow_and_ray_have_the_commands_and_options_of_a_page(
    program: str, words: list[str]
) -> None:
    command: Any = import_module(PROGRAMS[program]).cli
    options: set[str] = set()
    for word in words:
        if not isinstance(command, click.Group):
            break
        group, command = command, command.get_command(click.Context(command), word)
        assert command, f"no such command: {word}"
        if word == "symmetric-run":  # it takes what `ray start` takes, too
            options |= {name for each in group.commands["start"].params for name in each.opts}
    assert not isinstance(command, click.Group)
    options |= {name for parameter in command.params for name in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options


def test_what_is_no_command_is_found(parsed: list[Any]) -> None:
    for words in (["trian", "quickstart"], ["export", "run", "--fp61"], ["data", "folder"]):
        assert cli.run(words) == 2
    assert list(commands("cd x && .venv/bin/mhe data show x --out 'a b'   # remark")) == [
        ["data", "show", "x", "--out", "a b"]
    ]
    assert list(commands('git tag -m "mhe 1"')) == []


def test_the_tutorial_has_the_commands_that_init_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 60 folders, as the page says."""
    page = (ROOT / "docs" / "photos.md").read_text()
    (block,) = re.findall(r"prints the next three:\n\n(.+?)\n\n", page, re.DOTALL)
    image = Image.new("RGB", (24, 24), "red")
    for number in range(60):
        folder = tmp_path / "photos" / f"{number:03d}"
        folder.mkdir(parents=True)
        for name in "ab":
            image.save(folder / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["init", "photos"]) == 0
    printed = re.findall(r"\bmhe (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert printed == re.findall(r"^ {4}mhe (.+)$", block, re.MULTILINE)
    assert load_config("photos.yaml").head.kind == "full"
