"""Secrets do not leave the process."""

import logging
import sys

import pytest

from mhe_dist.config.schema import Config
from mhe_dist.redact import ScrubbingFormatter, flat, is_secret_name, masked, scrub


@pytest.mark.parametrize(
    "name",
    ["password", "db_password", "HF_TOKEN", "apiKey", "AWS_SECRET_ACCESS_KEY", "client-secret"],
)
def test_secret_names(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("DB_PASS", "PASSPHRASE", "SSH_KEY_PASSPHRASE", "encryptionKey", "SIGNING_KEY", "ssh-key"),
        *("AZURE_STORAGE_KEY", "S3_KEY", "server.tls_key"),
    ],
)
def test_common_names_of_passwords_and_keys_are_secret(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["num_tokens", "key", "monkey", "name", "tokenizer", "keep_last"])
def test_innocent_names(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("SSH_PUBLIC_KEY", "primary_key", "sort_key", "neighbour_key", "data.key", "key_name"),
        *("first_pass", "pass_rate", "bypass", "compass", "passed_over"),
    ],
)
def test_keys_that_open_nothing_are_no_secrets(name):
    assert not is_secret_name(name)


def test_no_key_of_a_config_is_taken_for_a_secret():
    config = Config.model_validate({"data": {"shards": "s"}})
    assert not [name for name in flat(config.model_dump()) if is_secret_name(name)]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://me:pw@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg://u:p%40w@db/mlflow", "postgresql+psycopg://***@db/mlflow"),
        ("s3://bucket/a?X-Amz-Signature=abc&b=1", "s3://bucket/a?X-Amz-Signature=***&b=1"),
        ("https://h/p?sig=abc and more", "https://h/p?sig=*** and more"),
        ("postgresql://mlflow:ab/c+d=@db:5432/x", "postgresql://***@db:5432/x"),
        ("mysql://me:a?b#c@db/x", "mysql://***@db/x"),
        ("http://me:p@ss@h/x", "http://***@h/x"),
        ("http://h:8080/a@b and http://[::1]:80/a@b", "http://h:8080/a@b and http://[::1]:80/a@b"),
        ("https://h/a:b@c, http://h:8080?a=b@c", "https://h/a:b@c, http://h:8080?a=b@c"),
        ("s3://bucket/shards", "s3://bucket/shards"),
        ("someone@example.org", "someone@example.org"),
    ],
)
def test_urls(text, clean):
    assert scrub(text) == clean


def test_values_of_secret_environment_variables(monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "s3cr3t-value")
    monkeypatch.setenv("SHORT_SECRET", "1")
    assert scrub("failed with s3cr3t-value at 1") == "failed with *** at 1"


def test_masked_keeps_the_shape_and_what_is_no_secret():
    tree = {
        "uri": "http://a:b@h",
        "model": {"class_token": True, "token": "abc", "api_key": ["x", "y"], "password": 7},
        "empty_secret": "",
        "lr": 0.1,
        "list": ["http://a:b@h", 3],
    }
    assert masked(tree) == {
        "uri": "http://***@h",
        "model": {
            "class_token": True,
            "token": "***",
            "api_key": ["***", "***"],
            "password": "***",
        },
        "empty_secret": "",
        "lr": 0.1,
        "list": ["http://***@h", 3],
    }


def test_flat():
    assert flat({"a": {"b": 1, "c": {"d": [2]}, "e": {}}, "f": None}) == {
        "a.b": 1,
        "a.c.d": [2],
        "a.e": {},
        "f": None,
    }


def test_the_working_folder_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/home/somebody")
    monkeypatch.setenv("OLDPWD", "/home/elsewhere")
    monkeypatch.setenv("DB_PWD", "s3cr3t-value")
    text = "/home/somebody/runs and /home/elsewhere with s3cr3t-value"
    assert scrub(text) == "/home/somebody/runs and /home/elsewhere with ***"


def test_a_log_has_no_secrets_in_what_is_said_nor_in_tracebacks():
    try:
        raise ValueError("https://h/p?sig=planted cannot be read")
    except ValueError:
        fields = ("name", logging.ERROR, "file", 1, "%s failed", ("http://me:planted@h",))
        record = logging.LogRecord(*fields, sys.exc_info())
    text = ScrubbingFormatter("%(levelname)s %(message)s").format(record)
    assert text.startswith("ERROR http://***@h failed\nTraceback")
    assert "planted" not in text
