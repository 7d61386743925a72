"""Pictures of the committed results of `kfo bench`: docs/pictures/NAME-*.png for each bench/results/NAME.json.

kfo bench --out runs/bench && cp runs/bench/results.json bench/results/MACHINE.json
python bench/plot_results.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kfo_ext.bench import plots, report

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if there is no result to draw, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder of the pictures")
    options = parser.parse_args(arguments)
    written = []
    for path in sorted(options.results.glob("*.json")):
        # Other benchmarks keep their results in the same folder.
        result = report.read(path)
        if result is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            written += plots.draw(result, options.out, f"{path.stem}-")
    for path in written:
        print(f"{path} {path.stat().st_size / 1e3:.0f} kB")
    if not written:
        print(f"{options.results}: no results of `kfo bench`")
    return int(not written)


if __name__ == "__main__":
    raise SystemExit(main())
