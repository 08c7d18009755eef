"""Requests made up from `/openapi.json`, right ones and wrong ones, against a server: schemathesis with all its checks.

    python serve.py &
    python -m tools.serve_fuzz --url http://127.0.0.1:8000 --max-examples 1000 --out serve_fuzz.json

For: the long form of `tests/serving/test_schemathesis.py`, and the one place where what may be refused is declared. Not
for: load (`benchmarks/serve_load.py`) and faults (`tools/serve_faults.py`).

Declared: a chat request that fits the schema may be refused with 400, for what no schema can say (`schemas.py` lists
it: whether a string is a picture, how many tokens a text has, ...). Everything else that fits is answered, and nothing
ever with a 5xx.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS = """\
[[operations]]
include-path = "/v1/chat/completions"
checks.positive_data_acceptance.expected-statuses = [200, 400]

[[operations]]
include-path = "/tokenize"
checks.positive_data_acceptance.expected-statuses = [200, 400]
"""
REQUEST_TIMEOUT_S = 120
"""A request with beams compiles its programs before it is answered; schemathesis itself gives up after 10 s, and takes
what took longer for a failure."""
PHASES = "examples,coverage,fuzzing,stateful"


@dataclass(frozen=True)
class Fuzzed:
    """What came of a run."""

    code: int
    """0: every check held."""
    output: str
    report: dict[str, Any]
    """As schemathesis writes it with `--report json`."""


def fuzz(url: str, *, key: str = "", max_examples: int, seed: int, phases: str = PHASES) -> Fuzzed:
    """Runs schemathesis against the server at `url`.

    Args:
        max_examples: generated requests of each route and phase.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings, report = Path(folder) / "schemathesis.toml", Path(folder) / "report.json"
        settings.write_text(SETTINGS)
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "run"]
        command += [f"{url}/openapi.json", "--checks", "all", "--mode", "all", "--phases", phases]
        command += ["--max-examples", str(max_examples), "--seed", str(seed), "--no-color"]
        command += ["--continue-on-failure", "--generation-database", "none", "--no-shrink"]
        command += ["--request-timeout", str(REQUEST_TIMEOUT_S)]
        command += ["--max-response-time", str(REQUEST_TIMEOUT_S)]
        command += ["--report", "json", "--report-json-path", str(report)]
        command += ["--header", f"Authorization: Bearer {key}"] if key else []
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        found = json.loads(report.read_text()) if report.exists() else {}
        return Fuzzed(done.returncode, done.stdout + done.stderr, found)


def main() -> int:
    """Runs, prints, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="an API key of the server")
    parser.add_argument("--max-examples", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the report goes")
    args = parser.parse_args()
    found = fuzz(args.url, key=args.key, max_examples=args.max_examples, seed=args.seed)
    print(found.output)
    if args.out is not None:
        args.out.write_text(json.dumps(found.report, indent=1) + "\n")
    return found.code


if __name__ == "__main__":
    sys.exit(main())
