"""``python -m tests.fuzz READER --seconds 60 [--seed N]``: damage its file again and again; print what came of it."""

from __future__ import annotations

import argparse
import faulthandler
import json
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

from stemtomo.errors import StemtomoError
from tests.fuzz.damage import DAMAGES
from tests.fuzz.readers import READERS

#: Beside what the process has when it starts; a header that asks for more is refused before memory is.
ALLOWANCE_BYTES = 3 << 29
#: No read of these small files may take longer.
LIMIT_S = 20
EXAMPLES = 200


def fuzz(name: str, seconds: float, start: int, folder: Path) -> dict[str, Any]:
    """Damage the files of one reader for ``seconds``; return how often it refused them and how often it read them."""
    reader = READERS[name]
    whole, work = folder / "whole", folder / "work"
    whole.mkdir()
    target = reader.write(whole).relative_to(whole)
    reader.read(whole / target)  # undamaged it can be read; and what is imported late is imported
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    _limit_memory()
    tally = {"refused": 0, "read": 0}
    found: dict[str, tuple[Any, BaseException]] = {}

    def one(damage: tuple[int, list[Any]]) -> None:
        number, changes = damage
        (folder / "last.json").write_text(json.dumps([str(names[number % len(names)]), repr(changes)]))
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        file = work / names[number % len(names)]
        data = file.read_bytes()
        for change in changes:
            data = change(data)
        file.write_bytes(data)
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)  # also where C code never comes back to Python
        try:
            reader.read(work / target)
            tally["read"] += 1
        except StemtomoError:
            tally["refused"] += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            found.setdefault(f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}", (damage, error))
        finally:
            faulthandler.cancel_dump_traceback_later()

    began, rounds = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        limits = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        seed(start + rounds)(limits(given(DAMAGES)(one)))()
        rounds += 1
    for kind, (damage, error) in found.items():
        print(f"--- {kind} after {damage}", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)
    if found:
        raise SystemExit(f"{name}: {tally}, and {len(found)} errors without a name: {', '.join(found)}")
    return tally


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ALLOWANCE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Fuzz one reader in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=list(READERS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    try:
        print(json.dumps(fuzz(told.reader, told.seconds, told.seed, folder)))
    except BaseException:
        if (folder / "last.json").exists():
            print(f"last damage: {(folder / 'last.json').read_text()}", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
