"""The command line as a whole: speed of help, exit statuses, what is printed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import sam3lora
from sam3lora.cli import env as env_verb
from sam3lora.cli import main
from sam3lora.errors import UserError

HEAVY = ("torch", "torchvision", "ray", "transformers", "peft", "numpy", "cv2", "PIL", "pandas", "scipy", "matplotlib")
VERBS = ["train", "validate", "compare", "infer", "export", "tune", "serve", "demo", "env", "data check", "data synth"]


def test_help_and_configuration_load_nothing_heavy():
    # --help in under a second means that no verb's libraries are loaded before it runs.
    check = f"""
import sys, sam3lora, sam3lora.config
from sam3lora.cli import main
for verb in {VERBS!r}:
    main([*verb.split(), "--help"])
print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    for verb in VERBS:
        assert f"Example:  sam3lora {verb}" in done.stdout


def test_module_runs_as_a_program_and_returns_the_status():
    done = subprocess.run([sys.executable, "-m", "sam3lora", "train", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert '"nothing" is neither a preset nor a YAML file' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "-h"], ["data", "synth", "--help"]])
def test_help_and_version_succeed(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "words", [["trian"], ["train"], ["train", "light", "--bogus"], ["train", "light", "--num-workers", "-1"]]
)
def test_usage_errors_are_the_users(words):
    assert main(words) == 2


def fail_with(monkeypatch, error: BaseException) -> None:
    def collect():
        raise error

    monkeypatch.setattr(env_verb, "collect", collect)


@pytest.mark.parametrize(
    ("error", "status"),
    # Only UserError means that the user can mend it.
    [(RuntimeError("broken inside"), 1), (ValueError("broken inside"), 1), (KeyboardInterrupt(), 130)],
)
def test_failure_and_interrupt(error, status, monkeypatch, capsys):
    fail_with(monkeypatch, error)
    assert main(["env"]) == status
    printed = capsys.readouterr().err
    assert all((part in printed) == (status == 1) for part in ("Traceback", "broken inside", "sam3lora env"))


def test_users_mistake_is_one_message_without_traceback(monkeypatch, capsys):
    fail_with(monkeypatch, UserError("expected a, got [b]: write c"))
    assert main(["env"]) == 2
    # Square brackets are text here, not markup.
    assert capsys.readouterr().err == "error: expected a, got [b]: write c\n"


def test_names_of_files_do_not_command_the_terminal(monkeypatch, capsys):
    fail_with(monkeypatch, UserError("no \x1b[31m\udcff\rö.png\nbut others"))
    assert main(["env"]) == 2
    assert capsys.readouterr().err == "error: no \\x1b[31m\\udcff\\rö.png\nbut others\n"


def test_environment_report_is_json_and_holds_no_token(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_of_mine")
    assert main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(text)
    assert facts["hugging_face"]["token_present"] is True
    assert "hf_a_secret_of_mine" not in text
    assert facts["packages"]["torch"]
    assert facts["cpu"]["count"] >= 1


def test_environment_report_without_torch(monkeypatch, capsys):
    # A broken torch is what many reports are about: the report itself has to survive it.
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["env"]) == 0
    assert "torch cannot be imported" in capsys.readouterr().out


def test_package_says_what_it_has():
    with pytest.raises(AttributeError, match="Predictor"):
        sam3lora.predictor  # noqa: B018
    assert sam3lora.load_config("light").lora.rank == 16
