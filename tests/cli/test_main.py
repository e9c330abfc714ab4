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

HEAVY = ("torch", "torchvision", "ray", "transformers", "peft", "numpy", "cv2", "pandas", "scipy", "matplotlib")


@pytest.mark.parametrize(
    "code",
    ["import sam3lora.cli.app", "import sam3lora", "from sam3lora.cli import main; main(['train', '--help'])"],
)
def test_help_loads_nothing_heavy(code):
    # --help in under a second means that no verb's libraries are loaded before it runs.
    check = f"import sys; {code}; print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""


def test_configuration_loads_neither_torch_nor_ray():
    check = f"import sys, sam3lora.config; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_module_runs_as_a_program_and_returns_the_status():
    done = subprocess.run([sys.executable, "-m", "sam3lora", "train", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert '"nothing" is neither a preset nor a YAML file' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "-h"], ["data", "synth", "--help"]])
def test_help_and_version_succeed(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("verb", [["train"], ["env"], ["demo"], ["data", "check"], ["data", "synth"]])
def test_help_of_every_verb_has_an_example(verb, capsys):
    main([*verb, "--help"])
    assert f"Example:  sam3lora {' '.join(verb)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["trian"], ["train"], ["train", "light", "--bogus"], ["train", "light", "--num-workers", "-1"]]
)
def test_usage_errors_are_the_users(words):
    assert main(words) == 2


def fail_with(monkeypatch, error: BaseException) -> None:
    def collect():
        raise error

    monkeypatch.setattr(env_verb, "collect", collect)


def test_users_mistake_is_one_message_without_traceback(monkeypatch, capsys):
    fail_with(monkeypatch, UserError("expected a, got [b]: write c"))
    assert main(["env"]) == 2
    # Square brackets are text here, not markup.
    assert capsys.readouterr().err == "error: expected a, got [b]: write c\n"


def test_internal_failure_shows_the_traceback(monkeypatch, capsys):
    fail_with(monkeypatch, RuntimeError("broken inside"))
    assert main(["env"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "broken inside" in error
    assert "sam3lora env" in error


def test_plain_value_error_is_an_internal_failure(monkeypatch):
    # Only UserError means that the user can mend it.
    fail_with(monkeypatch, ValueError("shape mismatch"))
    assert main(["env"]) == 1


def test_interrupt_has_its_own_status(monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["env"]) == 130


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
