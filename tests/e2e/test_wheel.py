"""The wheel, built from what the image is built from, in an environment without the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from matplotlib import get_data_path

from mhe_dist.config.load import load_config

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "STIXGeneral"]
FEW_IMAGES = [
    *("data.glyphs.fonts=fonts", "data.glyphs.min_fonts=3", "data.glyphs.max_classes=400"),
    "data.glyphs.heldout_classes=20",
    *("data.streams=8", "model.kwargs.channels=[8,16,16,32]", "model.embedding_dim=16"),
]
FEW_STEPS = [
    *("train.max_steps=4", "train.log_every=1", "scale.workers=1", "evaluate.pairs=20"),
    *("tracking.mlflow=false", "export.formats=[timm]"),
]


def admitted(path: Path) -> bool:
    """Whether .dockerignore lets a path reach the builder: the last line that fits decides."""
    names = [str(path), *map(str, path.parents)]
    found = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.lstrip("!").removeprefix("**/")
        parts = path.parts if line.startswith("**/") else names
        if any(fnmatch(part, pattern) for part in parts):
            found = line.startswith("!")
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Dockerfile copies before it installs, of what .dockerignore admits."""
    folder = tmp_path_factory.mktemp("source")
    build = (ROOT / "Dockerfile").read_text().partition("RUN /opt/mhe/bin/pip install")[0]
    for line in re.findall(r"^COPY (.+)$", build, re.MULTILINE):
        *sources, target = line.split()
        for found in map(ROOT.joinpath, sources):
            assert found.exists(), f"COPY {line}"
            base = folder / target if found.is_dir() else folder
            for file in [found] if found.is_file() else found.rglob("*"):
                if file.is_file() and admitted(file.relative_to(ROOT)):
                    copy = base / (file.relative_to(found) if found.is_dir() else file.name)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*PIP, "wheel", str(source), *offline, "-w", str(folder)], check=True)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and the dependencies of this one.

    A folder that a .pth file names is searched, but its own .pth files are not read: the editable
    installation of the checkout is out of sight.
    """
    folder = tmp_path_factory.mktemp("env") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(paths))
    python = str(folder / "bin" / "python")
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", str(wheel)], check=True)
    return folder / "bin"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which there is nothing, with no trace of the checkout around."""
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(program: Path, *arguments: str) -> str:
    """What a program prints; it has to succeed."""
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages_and_the_configs(wheel: Path) -> None:
    """Templates, styles and scripts of pages too, in whichever room."""
    names = {*zipfile.ZipFile(wheel).namelist()}
    configs = {f"mhe_dist/configs/{file.name}" for file in (ROOT / "configs").iterdir()}
    packages = ("launcher", "mhe_dist", "pipelines")
    files = {
        str(file.relative_to(ROOT))
        for package in packages
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert len(configs) > 5 and len(files) > 300
    assert configs | files <= names, sorted((configs | files) - names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {*packages}


def test_help_and_configs_need_no_checkout(environment: Path, empty: Path) -> None:
    where = "import mhe_dist, launcher; print(mhe_dist.__file__, launcher.__file__)"
    for file in run(environment / "python", "-c", where).split():
        assert Path(file).is_relative_to(environment.parent)
    assert "mhe train quickstart" in run(environment / "mhe", "--help")
    mine = empty / "mine.yaml"
    mine.write_text(run(environment / "mhe", "config", "quickstart"))
    assert load_config(str(mine)) == load_config(str(ROOT / "configs" / "quickstart.yaml"))
    schema = run(environment / "mhe", "config", "--schema")
    assert schema == (ROOT / "configs" / "schema.json").read_text()
    assert run(environment / "mhe", "config", "--yaml", "mine.yaml") == mine.read_text()


def test_every_study_finds_its_config(environment: Path, empty: Path) -> None:
    load = (
        "from launcher.reproduce.studies import STUDIES\n"
        "from mhe_dist.config.load import load_config\n"
        "print(*(load_config(study.config).model.name for study in STUDIES.values()))"
    )
    assert len(run(environment / "python", "-c", load).split()) > 5


def test_the_quickstart_trains_and_reports(environment: Path, empty: Path) -> None:
    (empty / "fonts").mkdir()
    for name in FONTS:
        shutil.copy(Path(get_data_path(), "fonts", "ttf", f"{name}.ttf"), empty / "fonts")
    said = run(environment / "mhe", "train", "quickstart", *FEW_IMAGES, *FEW_STEPS)
    assert "rank-1" in said
    assert "runs/quickstart/export/timm" in said
    run(environment / "mhe", "report", "quickstart", "--out", "page.html")
    assert "quickstart" in (empty / "page.html").read_text()
    assert os.listdir(empty / "data") == ["glyphs"]
