"""The held-out score of the smol model: drawings of a vendor it never saw, named by the shipped command's defaults.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python benchmarks/smol_heldout.py --pictures package/img/google/64

The list (`smol_heldout.json`) was committed before training. Each picture is asked "What is this?"; the name is the
answer's first sentence without "This is a". Right means: the same name, exactly. The category is that of the thing
which the answer names, looked up in the list; a name that is not in the list counts as wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from minigpt4_jax import Ask, GenerationConfig, MiniGPT4, UserError

LIST = Path(__file__).with_name("smol_heldout.json")
QUESTION = "What is this?"
_LEAD = re.compile(
    r"^(this|these|it|that) (is|are|looks like) |^(the picture|the image) shows "
    r"|^(a|an|the|some|any|pair of|pairs of) ",
    re.IGNORECASE,
)


def normalised_name(answer: str) -> str:
    """The thing that an answer names: first sentence, lower case, without its lead ("This is a") and articles."""
    name = re.split(r"[.!?,;\n]", answer.strip(), maxsplit=1)[0].strip().lower()
    while (shorter := _LEAD.sub("", name)) != name:
        name = shorter.strip()
    return name


def score(items: list[dict[str, Any]], answers: list[str]) -> dict[str, Any]:
    """Counts right names and right categories, overall and by category, and lists the commonest confusions."""
    category_of: dict[str, Counter[str]] = {}
    for item in items:
        category_of.setdefault(normalised_name(item["name"]), Counter())[item["category"]] += 1
    rows = []
    for item, answer in zip(items, answers, strict=True):
        name, truth = normalised_name(answer), normalised_name(item["name"])
        known = category_of.get(name)
        rows.append(
            {
                "code_point": item["code_point"],
                "name": truth,
                "category": item["category"],
                "answer": answer,
                "right_name": name == truth,
                # A name may stand for things of two categories: its own one counts if it is among them.
                "right_category": known is not None and item["category"] in known,
                "known": known is not None,
                "said": name,
            }
        )
    total = len(rows)
    by_category = {}
    for category in sorted({row["category"] for row in rows}):
        of = [row for row in rows if row["category"] == category]
        by_category[category] = {
            "pictures": len(of),
            "name": sum(row["right_name"] for row in of) / len(of),
            "category": sum(row["right_category"] for row in of) / len(of),
        }
    confusions = Counter(f"{row['name']} -> {row['said']}" for row in rows if not row["right_name"])
    return {
        "pictures": total,
        "name": sum(row["right_name"] for row in rows) / total,
        "category": sum(row["right_category"] for row in rows) / total,
        "unknown_names": sum(not row["known"] for row in rows) / total,
        "by_category": by_category,
        "confusions": [text for text, _ in confusions.most_common(40)],
        "rows": rows,
    }


def main() -> int:
    """Runs the benchmark; prints the score and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="the vendor's folder of PNG")
    parser.add_argument("--projection", type=Path, help="default: the shipped one")
    parser.add_argument("--slots", type=int, default=32, help="pictures answered side by side")
    parser.add_argument("--limit", type=int, help="only the first N of the list (a quick look)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: not written)")
    args = parser.parse_args()
    items = json.loads(LIST.read_text())["items"][: args.limit]
    missing = [item["file"] for item in items if not (args.pictures / item["file"]).is_file()]
    if missing:
        print(f"{args.pictures} lacks {len(missing)} pictures, the first is {missing[0]}.")
        return 2
    console = Console(stderr=True)
    try:
        model = MiniGPT4.load("smol", projection=args.projection, num_slots=args.slots)
    except UserError as error:
        print(error)
        return 2
    start, answers = time.perf_counter(), [""] * len(items)
    asks = (
        Ask(key=place, images=[args.pictures / item["file"]], prompt=QUESTION)
        for place, item in enumerate(items)
    )
    outcomes = model.answer_each(asks, generation=GenerationConfig())
    for place, outcome in track(outcomes, "asking", total=len(items), console=console):
        if isinstance(outcome, UserError):
            print(outcome)
            return 2
        answers[place] = outcome[0].text
    result = {"question": QUESTION, "seconds": round(time.perf_counter() - start, 1)}
    result |= score(items, answers)
    for line in (
        f"pictures        {result['pictures']}",
        f"name right      {result['name']:.1%}",
        f"category right  {result['category']:.1%}",
        f"unknown names   {result['unknown_names']:.1%}",
        *(
            f"  {name:18} {part['pictures']:4}  name {part['name']:.1%}  category {part['category']:.1%}"
            for name, part in result["by_category"].items()
        ),
        "confusions: " + "; ".join(result["confusions"][:12]),
    ):
        print(line)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
