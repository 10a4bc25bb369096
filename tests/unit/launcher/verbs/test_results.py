"""What `mhe export` says of what it wrote."""

from __future__ import annotations

from launcher.verbs.results import Format, _next_steps


def test_the_next_steps_name_the_files_that_were_written() -> None:
    paths = {
        Format.ONNX: "out/backbone_uint8_fp16.onnx",
        Format.MLFLOW: "out/mlflow",
        Format.HUB_FOLDER: "out/hub",
    }
    steps = {
        what: step if isinstance(step, str) else " ".join(step)
        for what, step in _next_steps(paths, "resnet10t")
    }
    assert list(steps) == [
        "use it (onnx)",
        "serve it (mlflow)",
        "publish it (say the licence first)",
    ]
    for path, step in zip(paths.values(), steps.values(), strict=True):
        assert path in step
