"""The typer application with all verbs."""

from __future__ import annotations

from typing import Annotated

import typer

from sam3lora.cli import compare, data, demo, env, export, infer, serve, train, tune, validate

app = typer.Typer(
    name="sam3lora",
    help="Teach SAM 3 a specialist's vocabulary with LoRA adapters, measure whether it helped, and serve the result.",
    epilog="Start here:  sam3lora demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        from .. import __version__

        typer.echo(f"sam3lora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("validate")(validate.validate)
app.command("compare")(compare.compare)
app.command("infer")(infer.infer)
app.command("env")(env.env)
app.command("demo")(demo.demo)
app.command("export")(export.export)
app.command("serve")(serve.serve)
