"""The documents against the code: commands that parse, files that exist, figures and names that are the code's."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nkat_ray import cli
from nkat_ray.config import PRESETS, RunConfig, TrainConfig
from nkat_ray.data.digests import dataset_digest
from nkat_ray.data.spec import KNOWN
from nkat_ray.report import tables

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
README, SPEC, DATA = (path.read_text() for path in (ROOT / "README.md", ROOT / "docs/spec.md", ROOT / "docs/data.md"))


def code_blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


# --- commands ---------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Thrown once the real parser has taken a command line: nothing is run."""


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each command of the documents: `tune`, or the subcommand of `nkat`, and its arguments."""
    for document in DOCUMENTS:
        for line in "\n".join(code_blocks(document.read_text(), "bash")).splitlines():
            words = shlex.split(re.sub(r".*&& |\S*\buv run ", "", line))
            if words[:2] == ["python", "tune_round2.py"]:
                yield "tune", words[2:]
            elif words[:1] == ["nkat"]:
                yield words[1], words[2:]


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], object]:
    """Runs a command up to the end of its parsing and returns what was parsed; there is always something to resume."""
    parse, parsed = cli.parse, []

    def stop_after_parsing(*args: object, **kwargs: object) -> None:
        parsed.append(parse(*args, **kwargs))  # type: ignore[arg-type]
        raise Parsed

    monkeypatch.setattr(cli, "parse", stop_after_parsing)
    monkeypatch.setattr("nkat_ray.prepare.saved_config", lambda *_: (RunConfig.from_preset("quick", resume=True), ()))
    monkeypatch.setattr("nkat_ray.commands.train.saved_training", lambda out: TrainConfig(out=out))

    def run(name: str, argv: list[str]) -> object:
        with pytest.raises(Parsed):
            cli.COMMANDS[name](argv)
        return parsed.pop()

    return run


def test_every_command_of_the_documents_is_understood(parse_only: Callable[[str, list[str]], object]) -> None:
    found = list(commands())
    assert {name for name, _ in found} >= set(cli.COMMANDS) - {"tune"}  # the documents show each of them
    for name, argv in found:
        assert parse_only(name, argv) is not None, (name, argv)


def test_a_wrong_command_would_be_noticed(parse_only: Callable[[str, list[str]], object]) -> None:
    with pytest.raises(ValueError, match="sapce"):
        parse_only("tune", ["--sapce", "round2"])


def test_the_notes_command_is_the_default_training(parse_only: Callable[[str, list[str]], object]) -> None:
    argv = next(argv for name, argv in commands() if name == "train" and "--nkat_decay" in argv)
    assert parse_only("train", argv) == TrainConfig()


def test_the_commands_are_those_of_the_program() -> None:
    listed = re.findall(r"^\| `nkat (\w+)` \|", section(README, "The commands"), re.MULTILINE)
    assert sorted(listed) == sorted(cli.COMMANDS)


# --- files ------------------------------------------------------------------------------------------------------------


def tree() -> set[str]:
    """Paths of the README's tree; folders end in a slash."""
    (block,) = code_blocks(section(README, "What is where"), "")
    folders: list[str] = []
    paths = set()
    for line in block.splitlines():
        match = re.fullmatch(r"((?:  )*)(\S+/|\S+\s+\S.*)", line)
        assert match, f"no path and text: {line!r}"
        name = match[2].split()[0]
        del folders[len(match[1]) // 2 :]
        paths.add("".join([*folders, name]))
        folders += [name] if name.endswith("/") else []
    return paths


def test_the_tree_names_every_file_of_the_package_and_none_that_is_not_there() -> None:
    package = ROOT / "nkat_ray"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    real = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    assert {path for path in tree() if path.startswith("nkat_ray/") and not path.endswith("/")} == real
    assert [path for path in tree() if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


# --- figures and names ------------------------------------------------------------------------------------------------


def plain(cell: str) -> str | float | None:
    """A cell of a table as the configuration has it; what follows a space is for people."""
    word = cell.split(" ")[0]
    try:
        return float(word)
    except ValueError:
        return None if word == "off" else word


def test_the_presets_table_has_the_presets_values() -> None:
    rows = re.findall(r"^\| `(\w+)`.*? \| (.+?) \| (.+?) \| (.+?) \|$", section(README, "Presets"), re.MULTILINE)
    assert len(rows) >= 8
    for name, *cells in rows:
        assert [plain(cell) for cell in cells] == [getattr(RunConfig.from_preset(p), name) for p in PRESETS], name


def test_the_contract_names_every_column_and_key() -> None:
    contract = section(SPEC, r"8\. Output contract")
    schemas = tables.TRIALS_SCHEMA, tables.CURVES_SCHEMA, tables.STAGE2_SCHEMA
    names = {name for schema in schemas for name in schema.names if not name.startswith(tables.CONFIG_PREFIX)}
    names |= {*tables.SUMMARY_KEYS, *tables.WINNER_KEYS}
    assert sorted(name for name in names if f"`{name}`" not in contract) == []
    reasons = section(SPEC, r"6\. Stages")
    assert [reason for reason in tables.STOP_REASONS if f"| `{reason}` |" not in reasons] == []


def test_the_spec_has_its_sections_and_every_cited_one() -> None:
    sections = re.findall(r"^#{2,3} (\d(?:\.\d)?)\.? ", SPEC, re.MULTILINE)
    assert [number for number in sections if "." not in number] == list("12345678")
    sources = [path.read_text() for folder in ("nkat_ray", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    cited = set(re.findall(r"spec(?:\.md)?\s+section\s+(\d(?:\.\d)?)", "\n".join(sources)))
    assert cited
    assert cited - set(sections) == set()


def test_the_digests_are_those_of_the_code() -> None:
    listed = dict(re.findall(r"^\| `(\w+)`.*? \| `(sha256:[0-9a-f]{64})` \|$", DATA, re.MULTILINE))
    contents = {name: known.release.contents for name, known in KNOWN.items()}
    assert listed == {name: dataset_digest(split["train"], split["test"]) for name, split in contents.items()}
