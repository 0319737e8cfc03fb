"""``classlens bench``: the group of benchmarks."""

from __future__ import annotations

import click

from classlens.bench.attribution import attribution
from classlens.bench.certify import certify
from classlens.bench.extract import extract
from classlens.bench.fidelity import fidelity
from classlens.bench.kernels import kernels
from classlens.bench.memory import memory
from classlens.bench.query import query
from classlens.bench.rivals import rivals
from classlens.bench.table import table


@click.group()
def bench() -> None:
    """Measures throughput, exactness and memory on this machine.

    Every benchmark checks its results before it times them, and times what it compares in turn in
    one run. With --json each prints one object: benchmark, machine, rows.
    """


for command in (kernels, extract, certify, fidelity, query, memory, rivals, attribution, table):
    bench.add_command(command)
