"""``python -m tests.benchmarks [NAME ...] [--json FILE]``: measure, print a table, write JSON. Each runs alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks import (
    catch_up,
    codecs,
    first_look,
    glass,
    joint,
    local_orbital,
    million,
    mistilted_columns,
    object_storage,
    pipelines,
    ptychography,
    streamed_volume,
    streaming,
    tiles,
    tomography,
    two_workers,
)
from tests.benchmarks.measure import Row, machine, print_result, python, table

BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "ptychography": ptychography.benchmark,
    "mistilt": mistilted_columns.benchmark,
    "joint": joint.benchmark,
    "tomography": tomography.benchmark,
    "codecs": codecs.benchmark,
    "s3": object_storage.benchmark,
    "streaming": streaming.benchmark,
    "first_look": first_look.first_look_rows,
    "watch": catch_up.catch_up_rows,
    "out_of_core": streaming.out_of_core_rows,
    "two_workers": two_workers.two_worker_rows,
    "streamed_volume": streamed_volume.streamed_rows,
    "tiles": tiles.benchmark,
    "tiles_10_gb": tiles.out_of_core_rows,
    "tiles_cluster": tiles.cluster_rows,
    "pipelines": pipelines.benchmark,
    "glass": glass.glass_rows,
    "million": million.million_rows,
    "local_orbital": local_orbital.epoch_rows,
    "local_orbital_epoch_100000": local_orbital.rows_epochs_100000,
    "local_orbital_depth": local_orbital.depth_rows,
    "local_orbital_25000": local_orbital.rows_25000,
    "local_orbital_100000": local_orbital.rows_100000,
}

#: Half an hour or more: measured when asked for by name.
LONG = {"tiles_10_gb", "local_orbital_depth", "local_orbital_25000", "local_orbital_100000"}
#: Longest run of one of these in seconds.
_NIGHT_S = 12 * 3600


def main() -> None:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all if none")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if given.inside:
        print_result([row for name in given.names for row in BENCHMARKS[name]()])
        return
    rows: list[Row] = []
    for name in given.names or [name for name in BENCHMARKS if name not in LONG]:
        timeout_s = _NIGHT_S if name in LONG else 900
        found = [Row(*values) for values in python("tests.benchmarks", ["--inside", name], timeout_s).result]
        print(table(found), end="\n\n", flush=True)
        rows += found
    if given.json:
        record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
        given.json.write_text(json.dumps({**record, "rows": [row._asdict() for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
