"""The documents against the code: commands that parse, files that exist, figures and names that are the code's."""

import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nkat_ray import cli
from nkat_ray.config import PRESETS, RunConfig, TrainConfig
from nkat_ray.data.digests import dataset_digest
from nkat_ray.data.spec import KNOWN
from nkat_ray.report import tables

ROOT = Path(__file__).resolve().parents[1]
JAPANESE = ROOT / "README.ja.md"
DOCUMENTS = (ROOT / "README.md", JAPANESE, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
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


def own_space(folder: Path) -> Path:
    """The search space that the how-to shows, as the file that its commands name."""
    (text,) = code_blocks((ROOT / "docs/howto/space.md").read_text(), "toml")
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, list[str]], object]:
    """Runs a command up to the end of its parsing and returns what was parsed; there is always something to resume."""
    parse, parsed = cli.parse, []
    own_space(tmp_path)
    monkeypatch.chdir(tmp_path)

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


# --- commands that are run --------------------------------------------------------------------------------------------

RUN_FOLDER = "runs/quick-20260101-120000"  # the name that the documents take as an example
DOCUMENTS_RUN = [ROOT / "README.md", ROOT / "docs/tutorial.md", ROOT / "docs/data.md"]
DOCUMENTS_RUN += sorted([*(ROOT / "docs/concepts").glob("*.md"), *(ROOT / "docs/howto").glob("*.md")])
NOT_RUN = {  # test_ecosystem.py runs those of docs/ecosystem.md; docs/cluster.md is for machines that are not here
    r"(python tune_round2\.py|nkat tune)(?!.*--dry_run)": "a search: minutes to days",
    r"nkat train(?!.*runs/leaves)": "a training: minutes to hours",
    r"nkat evaluate": "transfers on four datasets: minutes",
    r"nkat data fetch": "the network",
    r"nkat doctor": "starts Ray: test_doctor.py does",
    r"python -m uv|python -m pip|python benchmarks/": "installs, or measures for minutes",
}
LIGHTER = {  # what a Python block is changed to, so that it takes seconds
    "val_images=5000, train_images=None": "val_images=50, train_images=64",
    "epochs=10, warmup=1": "epochs=1, warmup=0",
}


def steps(document: Path) -> Iterator[tuple[str, str]]:
    """What a document has its reader do, in order: ("python", a block) or ("bash", a line)."""
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL):
        yield from [(language, block)] if language == "python" else ((language, line) for line in block.splitlines())


def runnable(line: str) -> list[str] | None:
    """The words of a command that a test can run in a minute; None for any other line."""
    line = re.sub(r".*&& |\S*\buv run ", "", line)
    ours = line.startswith(("nkat ", "python tune_round2.py", "python -c"))
    if not ours or any(re.match(pattern, line) for pattern in NOT_RUN):
        return None
    return [str(Path(word).expanduser()) if word.startswith("~") else word for word in shlex.split(line)]


@pytest.fixture
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tinted: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> Path:
    """A reader's machine: a home with photos, a few images as CIFAR-10, runs that have ended; it is where we stand."""
    from nkat_ray.config import TrialConfig
    from nkat_ray.data import Split
    from nkat_ray.data.parquet import pair_path, write_split
    from nkat_ray.data.spec import KNOWN as DATASETS
    from nkat_ray.model import create_nkat_vit
    from nkat_ray.train.checkpoint import Weights
    from nkat_ray.train.transfer import save_weights

    for name in ("oak", "maple"):
        (tmp_path / "photos/leaves" / name).mkdir(parents=True)
        for n in range(60):
            pixels = np.random.default_rng(n).integers(0, 100, (40, 30, 3), np.uint8)
            pixels[..., name == "oak"] += 120  # oak leaves are green
            Image.fromarray(pixels).save(tmp_path / "photos/leaves" / name / f"{n}.png")
    for split, n in (("train", 400), ("test", 50)):
        path = pair_path(tmp_path / "datasets", "cifar10", split)  # type: ignore[arg-type]
        path.parent.mkdir(exist_ok=True)
        classes = DATASETS["cifar10"].class_names
        write_split(path, Split(*tinted(n)), class_names=classes, source="a test", encoding="png", flip=True)
    build_run = runpy.run_path(str(ROOT / "tests/report/conftest.py"))["build_run"]
    config = TrialConfig(embed_dim=16, num_heads=2, depth=2, val_images=40)
    model = create_nkat_vit(config, num_classes=10)
    weights = Weights(
        config=config, dataset="cifar10", num_classes=10, grey=False, mean=(0.5,) * 3, std=(0.25,) * 3, epoch=3,
        val_accuracy=0.25, seed=0, tensors=model.state_dict(),
    )  # fmt: skip
    for name in (RUN_FOLDER, "runs/laptop-1", "runs/laptop-2", "runs/first"):
        build_run(tmp_path / name, journal=True)
        save_weights(weights, weights.to_bytes(), tmp_path / name / "best")
    own_space(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NKAT_DATA_DIR", str(tmp_path / "datasets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS_RUN, ids=lambda path: path.name)
def test_what_takes_under_a_minute_is_run(
    document: Path, reader: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for language, text in steps(document):
        if language == "python":
            for said, lighter in LIGHTER.items():
                text = text.replace(said, lighter)
            exec(compile(text, document.name, "exec"), {})
            continue
        words = runnable(text)
        if words is None:
            continue
        if words[:2] == ["python", "-c"]:  # typed in the run's folder
            with monkeypatch.context() as patch:
                patch.chdir(reader / RUN_FOLDER)
                exec(words[2], {})
        else:
            name, argv = ("tune", words[2:]) if words[0] == "python" else (words[1], words[2:])
            assert cli.COMMANDS[name](argv) == 0, text
        assert capsys.readouterr().out.strip(), text


def test_the_commands_that_are_run_are_not_few() -> None:
    lines = [text for document in DOCUMENTS_RUN for language, text in steps(document) if language == "bash"]
    run = [words[1] if words[0] == "nkat" else " ".join(words[:2]) for words in map(runnable, lines) if words]
    assert set(run) == {"simulate", "report", "explain", "data", "train", "python tune_round2.py", "python -c"}
    assert len(run) >= 25
    skipped = [line for line in lines if line.startswith(("nkat", "python")) and runnable(line) is None]
    for pattern in NOT_RUN:
        assert "install" in NOT_RUN[pattern] or any(re.match(pattern, line) for line in skipped), pattern


# --- the other language, the reference --------------------------------------------------------------------------------


def shape(text: str) -> list[tuple[str, int]]:
    """Headings by level and tables by rows, in order."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^(#+) |((?:^\|.*\n)+)", prose, re.MULTILINE)
    return [("heading", len(marks)) if marks else ("table", table.count("\n")) for marks, table in found]


def test_the_japanese_readme_keeps_step() -> None:
    japanese = JAPANESE.read_text()
    assert shape(japanese) == shape(README)
    assert code_blocks(japanese, "bash") == code_blocks(README, "bash")
    links = [set(re.findall(r"\]\(([^)#:]+)\)", text)) - {"README.md", "README.ja.md"} for text in (japanese, README)]
    assert links[0] == links[1]
    first_cells = [re.findall(r"^\| (`[^|]+?`)", text, re.MULTILINE) for text in (japanese, README)]
    assert [cells.split("` ")[0] for cells in first_cells[0]] == [cells.split("` ")[0] for cells in first_cells[1]]
    numbers = [re.findall(r"\d\.\d+", re.sub(r"\[.*?\]\(.*?\)", "", text)) for text in (japanese, README)]
    assert sorted(numbers[0]) == sorted(numbers[1])


def test_the_reference_is_what_the_code_says() -> None:
    written = runpy.run_path(str(ROOT / "docs/reference.py"))
    now = (ROOT / "docs/reference.md").read_text()
    assert now == written["reference"](), "stale: run `python docs/reference.py`"
    assert set(written["CONFIGS"]) == set(cli.COMMANDS)
    for name in ("--space", "--gate", "--top_k", "--images", "--test_fraction", "`alpha`"):
        assert name in now
    assert "own_space" not in now


def test_the_space_of_the_how_to_is_a_space(tmp_path: Path) -> None:
    run = RunConfig.from_preset("quick", space=str(own_space(tmp_path)))
    assert list(run.domains) == ["conv_stem", "embed_dim", "lr", "top_k"]


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
    assert [link for link in links if not (document.parent / link).exists()] == []  # pictures too


def test_every_cell_of_the_comparison_has_a_source() -> None:
    text = (ROOT / "docs/comparison.md").read_text()
    sources = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", text, re.MULTILINE))
    rows = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| [^-|]", line)]
    assert len(rows) >= 20
    assert {len(row) for row in rows} == {7}
    owners = "nrpswd"  # the first letter of a source's name: whose column it may stand in
    for _, *cells in rows:
        for owner, cell in zip(owners, cells, strict=True):
            found = re.findall(r"\]\[([\w-]+)\]", cell)
            assert found, cell
            assert {name[0] for name in found} == {owner}, cell
            assert re.sub(r"\[.*?\]\[.*?\]|[*,; ]", "", cell) == "", f"said without a source: {cell}"
    used = set(re.findall(r"\]\[([\w-]+)\]", text))
    assert used == set(sources)
    assert [to for to in sources.values() if "://" not in to and not (ROOT / "docs" / to).exists()] == []


def test_the_readme_shows_pictures_that_are_pictures() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert shown
    for name in shown:
        with Image.open(ROOT / name) as picture:
            assert picture.width >= 400
        assert (ROOT / name).stat().st_size < 600_000


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
