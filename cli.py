"""The root command. Sub-commands are imported when they are called, so ``--help`` is quick."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from classlens.extractor.errors import ClasslensError

COMMANDS = {
    "demo": ("classlens.bench.demo.command:demo", "The whole path on data that ships with it."),
    "pack": ("classlens.extractor.commands:pack", "Images and masks -> tar shards."),
    "extract": ("classlens.extractor.commands:extract", "Tar shards -> store of token scores."),
    "probe": ("classlens.extractor.commands_probe:probe", "Linear probes of every token -> store."),
    "info": ("classlens.extractor.commands:info", "What a store holds and how it was made."),
    "status": ("classlens.extractor.commands:status", "How far an extraction is."),
    "verify": ("classlens.extractor.commands:verify", "Checks every byte of a store."),
    "query": ("classlens.analysis.commands_query:query", "SQL over the scores of a store."),
    "export": ("classlens.analysis.commands_query:export", "A store -> one long Parquet file."),
    "analyze": ("classlens.analysis.commands_analyze:analyze", "The paper's analyses, as tables."),
    "perturb": (
        "classlens.analysis.commands_perturb:perturb",
        "The test of what is relevant: keep some patches.",
    ),
    "neurons": ("classlens.analysis.commands_neurons:neurons", "Every key neuron of the MLPs."),
    "report": ("classlens.analysis.commands_report:report", "Stores -> one HTML page of figures."),
    "study": ("classlens.analysis.commands_study:study", "Many runs, beside published numbers."),
    "reproduce": ("classlens.bench.reproduce:reproduce", "The paper's study, on your data."),
    "bench": ("classlens.bench.commands:bench", "Throughput and exactness here."),
}

EXIT_CODES = """
\b
Exit codes: 0 done; 1 unforeseen error; 2 wrong usage; 3 done, but some images
could not be scored; 4 unusable input data; 5 the store has another
configuration; 6 missing or damaged store; 7 unusable model; 130 interrupted.
"""


class LazyGroup(click.Group):
    """Lists its commands from a table and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ClasslensError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=LazyGroup, epilog=EXIT_CODES)
@click.version_option(package_name="classlens")
def cli() -> None:
    """Score every token of every block of a Vision Transformer in class-embedding space.

    \b
    Start here:   classlens demo
    Your data:    classlens pack imagefolder PHOTOS SHARDS
                  classlens extract SHARDS --model vit_base_patch16_224 --out STORE
    Ask:          classlens query STORE "SELECT block, AVG(identifiability) FROM scores
                  WHERE stream = 'resid' AND kind = 'patch' GROUP BY block ORDER BY block"
    Look:         classlens report STORE --out report.html
    """


def main() -> None:
    """Entry point of the ``classlens`` command."""
    try:
        sys.exit(cli(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; finished units are kept, the same command goes on.", err=True)
        sys.exit(130)
