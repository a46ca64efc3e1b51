"""Memory of `zppo build-data` by the number of rows: made-up rows in both layouts, half of them as
Parquet with pictures in the cells, half as JSONL with paths; one process for each count, its peak.

    python benches/build_data.py --rows 1000,10000,100000 [--characters 500]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT)]

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from raw_data import first, png, second, write_recipe  # noqa: E402

from zppo.config.options import at_least, positive, several  # noqa: E402
from zppo.errors import Parser, run_command  # noqa: E402

GROUP = 1000
PICTURES = 500
"""Different pictures; the rows differ by their words."""
PROGRAM = """
import json, resource, sys
from zppo.build_data import main
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_maxrss / 1024, used.ru_utime + used.ru_stime]), file=sys.stderr)
sys.exit(code)
"""


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=several(at_least(2)), default="1000,10000,100000")
    parser.add_argument("--characters", type=positive, default=500, help="of each question")
    arguments = parser.parse_args()
    print("     rows    kept  peak MiB  processor s  wall s")
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count // 2, "w" * arguments.characters)
            print(line(Path(folder), count), flush=True)


def make(folder: Path, count: int, words: str) -> None:
    """Both sources, written a group of rows at a time."""
    write_recipe(folder / "recipe.yaml", tiers=[])
    (folder / "first").mkdir()
    (folder / "second" / "pictures").mkdir(parents=True)
    writer: Any = None
    for rows in groups(count):
        table = [
            first(i, question=f"{words}{i}", images=[{"bytes": png(i % PICTURES), "path": None}])
            for i in rows
        ]
        part = pa.Table.from_pylist(table)
        writer = writer or pq.ParquetWriter(folder / "first" / "train.parquet", part.schema)
        writer.write_table(part, row_group_size=100)
    writer.close()
    for i in range(PICTURES):
        (folder / "second" / "pictures" / f"{i}.png").write_bytes(png(10_000 + i))
    with (folder / "second" / "train.jsonl").open("w") as stream:
        for i in range(count):
            picture = f"pictures/{i % PICTURES}.png"
            stream.write(json.dumps(second(i, question=f"{words}{i}", image=picture)) + "\n")


def groups(count: int) -> Iterator[range]:
    return (range(start, min(start + GROUP, count)) for start in range(0, count, GROUP))


def line(folder: Path, count: int) -> str:
    sources = [f"--{name}={folder / name}" for name in ("first", "second")]
    order = [f"--recipe={folder / 'recipe.yaml'}", *sources, f"--out={folder / 'out'}", "--json"]
    begun = time.monotonic()
    command = [sys.executable, "-P", "-c", PROGRAM, *order]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, processor = json.loads(done.stderr.splitlines()[-1])
    kept, wall = json.loads(done.stdout)["kept"], time.monotonic() - begun
    return f"{count:9,} {kept:7,} {peak:9.0f} {processor:12.1f} {wall:7.1f}"


if __name__ == "__main__":
    sys.exit(run_command(main))
