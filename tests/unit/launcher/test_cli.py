"""The command line: exit codes, messages, and nothing started for a mistake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from launcher import cli, execute
from launcher.signals import Interrupted
from launcher.terminal import console
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.config.shipped import shipped_configs
from mhe_dist.config.write import config_to_dict, save_config
from mhe_dist.errors import RunError, StorageUnavailable, UserError
from pipelines.runs.folder import read_run_config
from tests.support import tiny

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
VERBS = [
    *(
        ["train"],
        ["config"],
        ["evaluate"],
        ["export"],
        ["report"],
        ["embed"],
        ["doctor"],
        ["init"],
        ["search"],
    ),
    *(["data"], ["data", "glyphs"], ["checkpoint"], ["checkpoint", "inspect"]),
    *(["bench"], ["bench", "head"], ["bench", "data"], ["reproduce"]),
    *(["data", verb] for verb in ("recordio", "folder", "index", "verify", "show")),
    *(["evaluate", verb] for verb in ("heldout", "verification", "ijb", "identification", "probe")),
]
SUMMARY = {
    **{"run": "runs/a", "steps": 20, "classes": 50, "samples": 300, "world_size": 2},
    **{"resumed_from": None, "images_per_s": 812.4, "phases": {"train": 65.2, "export": 3.0}},
    "device": "NVIDIA H200",
    "training": {"loss": 1.25},
    "heldout": {"rank1": 0.85, "chance": 0.002, "accuracy": 0.97, "tar@far=1e-3": 0.5},
    "exports": {"timm": {"path": "runs/a/export/timm", "max_difference": 0.0}},
    "checkpoints": "runs/a/checkpoints",
    "mlflow": {"uri": "sqlite:///mlflow.db", "run_id": "1"},
}

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A small run in a folder of its own; its data is there as far as checks can see."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{}")
    head = {"groups": 8, "mhs": {"length": 100, "extra_heads": 8}}
    values = {"run": {"name": "a"}, "data": {"shards": "shards"}, "head": head}
    config = Config.model_validate(values)
    save_config(config, "a.yaml")
    return config


@pytest.mark.parametrize("verb", [[], *VERBS], ids=" ".join)
def test_every_verb_explains_itself(verb: list[str], capsys: Captured) -> None:
    assert cli.run([*verb, "--help"]) == 0
    assert "Usage: mhe" in capsys.readouterr().out


def test_the_version_is_told(capsys: Captured) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"mhe {metadata.version('mhe')}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("mhe tr", {"train"}),
        ("mhe data fo", {"folder"}),
        ("mhe data folder --held", {"--heldout-classes", "--heldout-images"}),
        ("mhe export --", {"--to", "--out"}),
    ],
)
def test_a_shell_completes_verbs_and_options(
    typed: str, offered: set[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_MHE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    assert cli.run([]) == 0
    found = set(capsys.readouterr().out.split())
    assert offered <= found
    assert "-" in typed or found == offered


def test_what_comes_before_ray_loads_no_heavy_library() -> None:
    script = (
        "import sys\n"
        "from launcher import cli\n"
        f"cli.run(['--help']); code = cli.run(['train', {QUICKSTART!r}, 'optim.lr=-1'])\n"
        "import pipelines.data.mixture.index\n"  # of check_selection
        "heavy = {'torch', 'ray', 'deepspeed', 'mlflow', 'timm'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if heavy or code != 2 else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]


@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM), 128 + signal.SIGTERM)],
)
def test_ctrl_c_is_told_where_a_verb_has_no_words_for_it(
    raised: KeyboardInterrupt, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def interrupt(*_: Any) -> None:
        raise raised

    monkeypatch.setattr("launcher.verbs.doctor.findings", interrupt)
    assert cli.run(["doctor"]) == code
    assert capsys.readouterr().err == "Interrupted.\n"


def test_ctrl_c_while_the_process_ends_shows_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What libraries do then is not to be broken off with a traceback of theirs."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["mhe", "--version"])
    try:
        with pytest.raises(SystemExit):
            cli.main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_help_alone_imports_no_verb() -> None:
    script = (
        "import sys\n"
        "from launcher import cli\n"
        "cli.run(['--help'])\n"
        "late = {'pydantic', 'omegaconf', 'numpy', 'fsspec', 'launcher.verbs.train'}\n"
        "sys.exit(str(late & set(sys.modules)) if late & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]


@pytest.mark.parametrize("name", cli.VERBS)
def test_the_list_of_verbs_says_what_their_own_help_says(name: str) -> None:
    verb = cli.load_verb(name)
    first_paragraph = (verb.help or "").split("\n\n")[0]
    assert cli.VERBS[name][1] == " ".join(first_paragraph.split())


def test_three_mistakes_are_told_together(capsys: Captured) -> None:
    mistakes = ["hed.kind=mhs", "optim.lr=-1", "data.shards=/nowhere"]
    assert cli.run(["train", QUICKSTART, *mistakes]) == 2
    said = capsys.readouterr().err
    assert "3 mistakes" in said
    for mistake in ("hed.kind=mhs", "did you mean head.kind", "optim.lr=-1", "/nowhere"):
        assert mistake in said
    assert "Traceback" not in said


@pytest.mark.parametrize("words", [["nonsense"], ["train"], ["config", QUICKSTART, "--nonsense"]])
def test_wrong_usage_is_a_mistake(words: list[str]) -> None:
    assert cli.run(words) == 2


def test_a_missing_file_is_a_mistake(capsys: Captured) -> None:
    assert cli.run(["config", QUICKSTART.replace("start", "strat")]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["embd", "quickstart", "--images", "x"], ["embd"], ["Embed"]])
def test_a_slip_in_a_command_that_is_submitted_is_told(words: list[str], capsys: Captured) -> None:
    assert cli.run(["submit", *words]) == 2
    assert f"{words[0]}: there is no such file; did you mean mhe submit embed?" in (
        " ".join(capsys.readouterr().err.split())
    )


@pytest.mark.parametrize("name", ["dat.yaml", *shipped_configs()])
def test_no_config_is_taken_for_a_command_that_is_submitted(name: str, capsys: Captured) -> None:
    assert cli.run(["submit", name, "hed.kind=mhs"]) == 2
    assert "did you mean mhe submit" not in " ".join(capsys.readouterr().err.split())


def test_a_config_with_a_name_like_that_of_a_command_is_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("embd").write_text("hed: {kind: mhs}\n")
    assert cli.run(["submit", "embd"]) == 2
    assert "did you mean head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("cure it"), 2), (RunError("lost"), 1), (OSError("disk"), 1)]
)
def test_errors_have_one_message_and_a_code(
    error: Exception, code: int, settings: Config, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("launcher.verbs.train.load_config", fail)
    assert cli.run(["train", "a.yaml"]) == code
    said = capsys.readouterr().err
    assert f"{error}" in said
    assert "Traceback" not in said
    assert ("--debug" in said) == (code == 1)
    assert cli.run(["train", "a.yaml"], debug=True) == code
    assert "Traceback" in capsys.readouterr().err


def test_errors_show_no_secrets(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def fail(*_: object) -> None:
        raise UserError("https://host/lfw.bin?X-Amz-Signature=planted: cannot be opened")

    monkeypatch.setattr("launcher.verbs.train.load_config", fail)
    assert cli.run(["train", "a.yaml"]) == 2
    console.note("http://me:planted@host")
    said = capsys.readouterr().err
    assert "X-Amz-Signature=***" in said and "planted" not in said


def test_config_shows_values_and_meanings(capsys: Captured) -> None:
    assert cli.run(["config", "--table", QUICKSTART, "optim.lr=0.25"]) == 0
    shown = capsys.readouterr().out
    assert "optim.lr" in shown
    assert "0.25" in shown
    words = " ".join(shown.split())
    assert "(default: 0.1)" in words
    assert "Which head; the block of the same name configures it. one of full, partial_fc," in words
    assert "a whole number greater than 0" in words and "true or false" in words


def test_config_as_yaml_can_be_run_again(capsys: Captured, tmp_path: Path) -> None:
    assert cli.run(["config", QUICKSTART, "--yaml", "optim.lr=0.25"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert load_config(str(again)) == load_config(QUICKSTART, ["optim.lr=0.25"])


def test_config_in_a_file_is_yaml(capsys: Captured, tmp_path: Path) -> None:
    assert cli.run(["config", "quickstart"]) == 0
    mine = tmp_path / "mine.yaml"
    mine.write_text(capsys.readouterr().out)
    assert load_config(str(mine)) == load_config(QUICKSTART)


@pytest.mark.parametrize("option", ["--yaml", "--table"])
def test_config_says_what_auto_becomes(option: str, tmp_path: Path, capsys: Captured) -> None:
    auto = {"groups": "auto", "mhs": {"length": "auto", "extra_heads": "auto"}}
    lost = tiny.config(tmp_path, f"{tmp_path}/data", head=auto)
    file = f"{tmp_path}/a.yaml"
    save_config(lost, file)
    assert cli.run(["config", file, option]) == 0
    assert "become numbers when the classes of data.shards are known" in capsys.readouterr().out
    tiny.write_shards(tmp_path / "data")
    assert cli.run(["config", file, option]) == 0
    said = capsys.readouterr().out
    line = "auto: head.groups=1, head.mhs.length=30, head.mhs.extra_heads=0: "
    assert line in said and "with 30 classes head.kind=full finds no less" in said
    if option == "--yaml":  # that can be run again
        (tmp_path / "again.yaml").write_text(said)
        assert load_config(f"{tmp_path}/again.yaml") == lost


def test_config_prints_the_schema(capsys: Captured) -> None:
    assert cli.run(["config", "--schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "schema.json").read_text()
    assert cli.run(["config"]) == 2
    assert cli.run(["config", "quickstart", "--schema"]) == 2


def test_a_complete_run_is_shown_and_left_alone(
    settings: Config, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    save_config(settings, f"{settings.run.path}/config.yaml")
    Path(settings.run.path, "summary.json").write_text(json.dumps(SUMMARY))
    monkeypatch.delattr(execute, "train_locally")
    assert cli.run(["train", "a.yaml", "scale.workers=2"]) == 0
    shown = capsys.readouterr().out
    for part in ("is complete", "1.250", "85.00% (chance 0.20%)", "812 images/s", "1 min 05 s"):
        assert part in shown
    for part in ("runs/a/export/timm", "runs/a/logs", "mlflow ui", "mhe evaluate runs/a"):
        assert part in shown


def test_a_complete_run_with_other_settings_is_refused(settings: Config, capsys: Captured) -> None:
    save_config(settings, f"{settings.run.path}/config.yaml")
    Path(settings.run.path, "summary.json").write_text(json.dumps(SUMMARY))
    assert cli.run(["train", "a.yaml", "optim.lr=0.7"]) == 2
    assert "optim.lr: 0.1 in the run, 0.7 now" in capsys.readouterr().err


def test_more_workers_than_a_run_has_groups_are_refused_before_it_starts(
    settings: Config, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """`head.groups` is `auto` in the file, and a number in the run."""
    values = config_to_dict(settings)
    values["head"]["groups"] = 2
    save_config(Config.model_validate(values), f"{settings.run.path}/config.yaml")
    monkeypatch.delattr(execute, "train_locally")
    monkeypatch.setattr(console, "capture_logs", nullcontext)
    assert cli.run(["train", "a.yaml", "head.groups=auto", "scale.workers=4"]) == 2
    assert "head.groups=2 is less than scale.workers=4" in capsys.readouterr().err


def test_the_settings_of_a_run_are_kept_before_it_starts(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Config, handle: Callable[[dict[str, object]], None], *_: bool) -> None:
        assert read_run_config(config.run.path) == config_to_dict(config)
        handle({"event": "end", "summary": SUMMARY})

    monkeypatch.setattr(execute, "train_locally", train)
    monkeypatch.setattr(console, "capture_logs", nullcontext)
    assert cli.run(["train", "a.yaml", "optim.lr=0.7"]) == 0


def test_a_local_run_can_be_followed_by_its_name(
    settings: Config, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def train(config: Config, handle: Callable[[dict[str, object]], None], dashboard: bool) -> None:
        assert dashboard
        handle({"event": "dashboard", "link": "http://127.0.0.1:8265"})
        handle({"event": "warning", "step": 7, "message": "the loss is 0"})
        handle({"event": "end", "summary": SUMMARY})

    monkeypatch.setattr(execute, "train_locally", train)
    monkeypatch.setattr(console, "capture_logs", nullcontext)
    assert cli.run(["train", "a.yaml", "--dashboard"]) == 0
    shown = capsys.readouterr().out
    assert "Ray's dashboard: http://127.0.0.1:8265" in shown and "NVIDIA H200" in shown
    for options in ([], ["-f"]):
        assert cli.run(["logs", "a", *options]) == 0
        shown = capsys.readouterr().out
        assert "step 7  warning: the loss is 0" in shown and "exit code 0" in shown
        assert "Logs of its workers: runs/a/logs" in shown


def test_a_run_without_a_log_is_told_as_such_before_a_cluster_is(
    settings: Config, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("launcher.ray_cluster.dashboard.DEFAULT_ADDRESS", "http://127.0.0.1:9")
    save_config(settings, f"{settings.run.path}/config.yaml")
    assert cli.run(["logs", "a"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: runs/a has no log: mhe train writes runs/a/logs/run.log")
    assert "mhe report runs/a" in said and "Nor is it a job: no Ray cluster answers" in said
    for verb in ("status", "stop"):
        assert cli.run([verb, "a"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said.startswith("error: runs/a is a run of this machine: ")
        assert "mhe logs a shows how it does" in said
        assert "Nor is it a job: no Ray cluster answers" in said
    assert cli.run(["logs", "b"]) == 2
    assert capsys.readouterr().err.startswith("error: no run at b or runs/b")


def test_an_interrupted_run_says_how_to_go_on(
    settings: Config, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def train(config: Config, handle: object, *_: bool) -> None:
        folder = Path(config.run.path, "checkpoints", "step_00000040")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").touch()
        raise Interrupted(2)

    monkeypatch.setattr(execute, "train_locally", train)
    monkeypatch.setattr(console, "capture_logs", nullcontext)
    monkeypatch.setattr(sys, "argv", ["mhe", "train", "a.yaml"])
    assert cli.run(["train", "a.yaml"]) == 130
    said = capsys.readouterr().out
    assert "goes on from runs/a/checkpoints/step_00000040" in said
    assert "mhe train a.yaml" in said
    assert not Path("runs/a/logs/run.log").exists()  # nothing happened in it

    def no_answer(path: str) -> None:
        raise StorageUnavailable(path)

    monkeypatch.setattr("launcher.verbs.train.newest_checkpoint", no_answer)
    assert cli.run(["train", "a.yaml"]) == 130, "how it ended is not how its store answers"
