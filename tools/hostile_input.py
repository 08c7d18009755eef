"""Counts what becomes of hostile pictures and addresses at the server's reader, for `docs/reliability.md`.

    python -m tools.hostile_input --changed 2000 --out benchmarks/results/hostile_input.json

For: numbers of the corpora in `tests/hostile_pictures.py` and `tests/hostile_urls.py`, which the tests go through with
their claims. Not for: those claims, nor HTTP. Ends with 1 if anything got an answer that it must not get, or if a
socket was connected; an audit hook of the interpreter sees every connection.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minigpt4_jax.serve_config import PicturesConfig
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.fetch import Fetcher
from tests.hostile_pictures import Case, all_cases
from tests.hostile_urls import ADDRESSES, LISTED, NUMERIC_SPELLINGS, URLS
from tests.serving.picture_reading import data_url, read_or_refusal, reader

NAME = LISTED[0]


def count_pictures(cases: Iterable[Case]) -> dict[str, Any]:
    """Pictures taken and refused, by code; and those whose answer was wrong."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    with reader() as made:
        for case in cases:
            result = read_or_refusal(made, data_url(case.data))
            refused = isinstance(result, ApiError)
            outcomes[f"{result.status} {result.code}" if refused else "a picture"] += 1
            right = "either" if case.expected == "either" else "taken" if not refused else "refused"
            expected = "refused" if case.expected == "too large" else case.expected
            if right != expected or (refused and result.status != 400):
                wrong.append(case.name)
    return {
        "cases": outcomes.total(),
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": wrong,
    }


def count_addresses() -> dict[str, Any]:
    """URLs and addresses that were asked for, and what they led to."""
    seen: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("socket.connect", "socket.sendto"):
            seen.append(str(arguments[1]))

    sys.addaudithook(watch)  # cannot be taken away again, hence `watching`
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asked = [(url, LISTED, ["93.184.216.34"]) for url in URLS]
    asked += [(f"https://{name}/a.png", (name,), None) for name in NUMERIC_SPELLINGS]
    asked += [(f"https://{NAME}/a.png", LISTED, [address]) for address in ADDRESSES]
    asked += [(f"https://{NAME}/a.png", LISTED, ["1.1.1.1", address]) for address in ADDRESSES]
    refused = 0
    for url, hosts, answers in asked:
        config = PicturesConfig(fetch_hosts=hosts, fetch_plain_http=True)
        own = (
            {}
            if answers is None
            else {"resolve": lambda _, port, to=answers: [(a, port) for a in to]}
        )
        made = Fetcher(config, verify=nobody, **own)
        try:
            asyncio.run(made.fetch(url, param="url"))
        except ApiError as error:
            refused += error.status == 400
        made.close()
    watching = False
    return {"attempts": len(asked), "refused": refused, "connections": seen}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--changed", type=int, default=2000, help="changed files of each format")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pictures, addresses = count_pictures(all_cases(arguments.changed)), count_addresses()
    found = {"pictures": pictures, "addresses": addresses}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    failed = pictures["wrong"] or addresses["connections"]
    return 1 if failed or addresses["refused"] != addresses["attempts"] else 0


if __name__ == "__main__":
    sys.exit(main())
