"""docs/bad_input.md is what tools/bad_input wrote: every case of it, in order, with the message it asks for.

The cases themselves are run by the script; what they are about is tested where it lives (`tests/data/test_images.py`,
`tests/data/test_image_refusals.py`, `tests/training/test_checkpoints.py`, `tests/test_config.py`, `tests/convert/`).
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from minigpt4_jax import cli

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "bad_input" / "__main__.py"
sys.path.insert(0, str(SCRIPT.parent))  # as `python tools/bad_input` does
spec = importlib.util.spec_from_file_location("bad_input_table", SCRIPT)
assert spec is not None
assert spec.loader is not None
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)
sys.path.remove(str(SCRIPT.parent))

PAGE = (ROOT / "docs" / "bad_input.md").read_text()


def rows() -> list[list[str]]:
    """The cells of every row: input, command, exit code, message."""
    lines = [
        line for line in PAGE.splitlines() if line.startswith("| ") and "| input |" not in line
    ]
    return [re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |")) for line in lines]


def plain(cell: str) -> str:
    text = cell.replace("<br>", "\n").replace("&lt;", "<")
    return re.sub(r"\\([\\|*_])", r"\1", text)


def test_the_page_has_exactly_the_cases_of_the_script() -> None:
    cases = sorted(table.CASES, key=lambda case: list(groups()).index(case.group))
    assert [(row[0], row[2]) for row in rows()] == [
        (table.cell(case.what), str(case.code)) for case in cases
    ]


def groups() -> dict[str, None]:
    return dict.fromkeys(case.group for case in table.CASES)


def test_every_command_on_the_page_is_the_one_of_its_case() -> None:
    by_name = {(case.what, str(case.code)): case for case in table.CASES}
    for what, command, code, said in rows():
        case = by_name[plain(what), code]
        assert table.row(case, int(code), plain(said)).split(" | ")[1] == command


def test_every_message_on_the_page_is_the_one_asked_for() -> None:
    by_name = {case.what: case for case in table.CASES}
    assert len(by_name) == len(table.CASES), "two cases have one name"
    for what, _, _, said in rows():
        assert re.search(by_name[plain(what)].says, plain(said), re.S), what


def test_no_message_is_a_traceback_or_empty() -> None:
    for what, _, code, said in rows():
        assert "Traceback" not in said, what
        assert len(said) > 5, what
        assert code in ("0", "2", "130")


@pytest.mark.parametrize(
    "word",
    """text|empty|cut in half|RGBA|grey|palette|CMYK|16 bits|animation|EXIF|1 x 1 pixel|1 x 5000|20,000 x 20,000
    |another language model|no tokenizer|another SHA-256|does not answer|full disk|unknown key|word for a number
    |flipped bit|Ctrl-C|permission|FIFO|HEIC""".replace("\n    ", "").split("|"),
)
def test_what_users_meet_is_a_case(word: str) -> None:
    assert [case for case in table.CASES if word in case.what]


@pytest.mark.parametrize("what", ["an empty file", "a folder", "an unknown key in a section"])
def test_a_command_ends_as_the_page_says(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = next(case for case in table.CASES if case.what == what)
    (said,) = [plain(row[3]) for row in rows() if plain(row[0]) == what]
    monkeypatch.chdir(tmp_path)
    case.prepare()
    program, *arguments = case.command
    assert cli.main(["train", *arguments] if program == "train.py" else arguments) == case.code
    assert capsys.readouterr().err.strip() == said


def test_odd_characters_stay_inside_their_cell() -> None:
    text = "a|b\\c\n<d> *e* _f_ \x1b"
    assert plain(table.cell(text)) == text.replace("\x1b", "\\x1b")
    assert "\n" not in table.cell(text)
    assert not re.search(r"(?<!\\)\|", table.cell(text))
