"""What the pages show is there: commands parse, links and files exist, names of the package resolve."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sam3lora.cli.app import app
from sam3lora.cli.argv import normalize_argv
from sam3lora.config import load_config, preset_names
from sam3lora.config.yaml_text import parse_yaml
from sam3lora.tune.space.parameters import KINDS
from sam3lora.tune.space.reader import load_space, space_names
from sam3lora.tune.space.search_space import SearchSpace

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(
    path.relative_to(ROOT)
    for package in ("sam3lora", "serve_app")
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text()
)
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

_FENCE = re.compile(r"^```.*?$(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_COMMAND = re.compile(
    r"^(?:sam3lora|serve (?:run|deploy|status)|python jobs/\w+\.py|ray job submit .*-- python jobs/\w+\.py)(?= |$)"
)
_PREFIX = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:taskset -c \S+ )?")
_LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
_FILE = re.compile(r"(?<![\w./-])(?:sam3lora|serve_app|examples|jobs|tune_spaces|docs|tests|\.ci)/[\w./-]*\w")
_NAME = re.compile(r"(?<![\w./-])sam3lora(?:\.\w+)+")
_IMPORT = re.compile(r"^\s*from (sam3lora[\w.]*) import (.+)$", re.MULTILINE)


def shown_lines(text: str) -> list[str]:
    """Lines of indented and fenced code, continued lines joined."""
    text = text.replace("\\\n", " ")
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [*indented, *(line.strip() for block in _FENCE.findall(text) for line in block.splitlines())]


def shown_commands(text: str) -> Iterator[str]:
    """Commands of indented and fenced code, synopses without brackets."""
    for line in (_PREFIX.sub("", line) for line in shown_lines(text)):
        if _COMMAND.match(line):
            yield re.sub(r"\[(--[^]]*)\]", r"\1", line).replace(" ...", "")


def inline_commands(text: str) -> Iterator[str]:
    return (code for code in _INLINE.findall(text) if _COMMAND.match(code))


def parser_of(words: list[str]) -> tuple[Any, list[str]]:
    """The parser that a command line meets, and the words for it."""
    if words[0] == "serve":
        from ray.serve.scripts import cli

        verb = cli.commands[words[1]]
        assert all((ROOT / word).exists() for word in words[2:] if word.endswith(".yaml")), "no such file"
        return verb, words[2:]
    while words[0] not in ("sam3lora", "python"):  # ray job submit ... -- python jobs/x.py
        words = words[words.index("--") + 1 :]
    command = typer.main.get_command(app)
    if words[0] == "sam3lora":
        words = words[1:]
    else:
        job, words = ROOT / words[1], words[2:]
        if is_verb(job):
            words = [job.stem, *words]
        else:
            command = typer.main.get_command(job_app(job))
    while (commands := getattr(command, "commands", None)) and words and not words[0].startswith("-"):
        assert words[0] in commands, f"no verb {words[0]}, there are {', '.join(commands)}"
        command, words = commands[words[0]], words[1:]
    return command, normalize_argv(words)


def is_verb(job: Path) -> bool:
    """Whether a job is the verb of the same name."""
    return "sam3lora.cli import main" in job.read_text()


def job_app(job: Path) -> typer.Typer:
    spec = importlib.util.spec_from_file_location(f"job_{job.stem}", job)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "app"):
        return module.app
    single = typer.Typer()
    single.command()(module.main)
    return single


def check_command(line: str) -> None:
    """Parse all of a command, but do not run it; settings of `train` and `tune` must make what they start with."""
    command, words = parser_of(shlex.split(line, comments=True))
    context = command.make_context(command.name, words)
    if command.name == "train" and context.params["config"] in preset_names():
        load_config(context.params["config"], context.params["overrides"])
    if command.name == "tune" and context.params["space"] in space_names():
        chosen = ("config", "num_trials", "algorithm", "metric", "max_concurrent")
        names = {name: context.params[name] for name in chosen}
        load_space(context.params["space"], overrides=context.params["overrides"] or (), **names)


def check_options(line: str) -> None:
    """Look for the options of a command that is mentioned without all of its arguments."""
    command, words = parser_of(shlex.split(line))
    unknown = {word.partition("=")[0] for word in words if word.startswith("-")} - options_of(command) - {"--help"}
    assert not unknown, f"no option {', '.join(sorted(unknown))}"


def options_of(command: Any) -> set[str]:
    """Those of a command and of its sub-commands."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options_of(verb) for verb in getattr(command, "commands", {}).values()))


def anchors(page: Path) -> set[str]:
    """Targets of links into a page, as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_are_found():
    # Otherwise the tests below would pass over nothing.
    assert {"README.md", "evaluation.md", "training.md"} <= {page.name for page in PAGES}
    commands = [command for page in PAGES for command in shown_commands(page.read_text())]
    assert {command.split()[0] for command in commands} == {"sam3lora", "serve", "python", "ray"}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("sam3lora trian x", "no verb trian"),
        ("sam3lora validate --wieghts x", "wieghts"),
        ("sam3lora train light lora.rnak=8", "rnak"),
        ("sam3lora tune lora_quick --config demo lora.rnak=8", "rnak"),
        ("sam3lora tune lora_quick training.learning_rate=1e-4", "searched"),
        ("ray job submit --working-dir . -- python jobs/tune.py lora_quick --algorithm gird", "gird"),
        ("python jobs/predict.py --input x --prompt y --output z --shift", "shift"),
        ("ray job submit --working-dir . -- python jobs/validate.py --nosuch 1", "nosuch"),
        ("python jobs/nosuch.py", "nosuch"),
        ("sam3lora serve --adaptors x", "adaptors"),
        ("serve deploy --nosuch serve_app/config.yaml", "nosuch"),
        ("serve run serve_app/nosuch.yaml", "no such file"),
    ],
)
def test_wrong_commands_are_seen(line, complaint):
    with pytest.raises(Exception, match=complaint):
        check_command(line)


def test_wrong_options_of_a_mentioned_command_are_seen():
    check_options("sam3lora data split --seed 1")
    with pytest.raises(AssertionError, match="--sede"):
        check_options("sam3lora data split --sede 1")


def test_continued_lines_prefixes_and_synopses_are_read():
    text = "    X=1 taskset -c 1 python jobs/x.py --a \\\n        --b\n    plain text\n    sam3lora y A [--c D] ...\n"
    assert [command.split() for command in shown_commands(text)] == [
        ["python", "jobs/x.py", "--a", "--b"],
        ["sam3lora", "y", "A", "--c", "D"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    faults = []
    text = page.read_text()
    for check, lines in ((check_command, shown_commands(text)), (check_options, inline_commands(text))):
        for line in lines:
            try:
                check(line)
            except Exception as error:
                faults.append(f"{line}: {error}")
    assert not faults, "\n".join(faults)


def test_options_that_are_mentioned_exist():
    # `--threshold 0.5` alone, in a table say, belongs to some verb or job.
    jobs = [typer.main.get_command(job_app(job)) for job in ROOT.glob("jobs/*.py") if not is_verb(job)]
    known = options_of(typer.main.get_command(app)).union(*map(options_of, jobs))
    mentioned = {code.split()[0] for page in PAGES for code in _INLINE.findall(page.read_text()) if code[:2] == "--"}
    assert "--nms-iou" in mentioned
    assert mentioned - known - {"--help"} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for link in _LINK.findall(page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_exist(page):
    text = page.read_text()
    missing = [file for file in _FILE.findall(text) if not (ROOT / file).exists()]
    names = {name for name in _NAME.findall(text) if not name.endswith((".json", ".git"))}
    for module, imported in _IMPORT.findall(text):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    for name in sorted(names):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert not missing


def space_on_page(page: str) -> SearchSpace:
    (block,) = re.findall(r"^    base: .*\n(?:    .*\n)+", (ROOT / page).read_text(), re.MULTILINE)
    return load_space(parse_yaml(textwrap.dedent(block), page))


def test_search_spaces_of_the_pages_load():
    page = (ROOT / "docs/sweeps.md").read_text()
    assert {item.kind for item in space_on_page("docs/sweeps.md").parameters.values()} == set(KINDS)
    assert space_on_page("docs/dense.md").search.metric == "mean_iou"
    assert [name for name in space_names() if f"| `{name}` |" not in page] == []


def test_layout_lists_every_package():
    listed = (ROOT / "README.md").read_text().partition("## Layout")[2]
    packages = {init.parent.name for init in ROOT.glob("sam3lora/*/__init__.py")}
    assert packages
    assert {name for name in packages if f"    sam3lora/{name} " not in listed} == set()


def test_readme_lists_every_page():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in readme] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_examples_in_docstrings(path: Path):
    result = doctest.testmod(importlib.import_module(".".join(path.with_suffix("").parts)))
    assert result.attempted
    assert not result.failed
