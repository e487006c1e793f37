"""Check the documents against the code: commands parse, files exist, figures and names are those of the code."""

import ast
import dataclasses
import importlib
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import nkat_ray
from nkat_ray import cli
from nkat_ray.commands.evaluate import EvaluateConfig
from nkat_ray.commands.train import TrainConfig
from nkat_ray.config import EXPECTED, PRESETS, RunConfig
from nkat_ray.data.digests import dataset_digest
from nkat_ray.data.spec import KNOWN
from nkat_ray.record import tables
from nkat_ray.space import SPACES, SearchSpace, space_of

ROOT = Path(__file__).resolve().parents[1]
JAPANESE = {  # a page and its original
    "README.ja.md": "README.md",
    "docs/ja/install.md": "docs/install.md",
    "docs/ja/tutorial.md": "docs/tutorial.md",
    "docs/ja/results.md": "docs/howto/results.md",
}
DOCUMENTS = tuple(sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]))
README, SPEC, DATA = (path.read_text() for path in (ROOT / "README.md", ROOT / "docs/spec.md", ROOT / "docs/data.md"))


def code_blocks(text: str, language: str) -> list[str]:
    """Return the contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """Return the text below a heading of the second level."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield each command of the documents: `tune`, or the subcommand of `nkat`, and its arguments."""
    for document in DOCUMENTS:
        for line in "\n".join(code_blocks(document.read_text(), "(?:bash|powershell)")).splitlines():
            words = shlex.split(re.sub(r".*&& |.*\buv run (--no-sync )?", "", line))
            if words[:2] == ["python", "tune_round2.py"]:
                yield "tune", words[2:]
            elif words[:1] == ["nkat"]:
                yield words[1], words[2:]


def own_space(folder: Path) -> Path:
    """Write the search space of the how-to as the file that its commands name."""
    (text,) = code_blocks((ROOT / "docs/howto/space.md").read_text(), "toml")
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, list[str]], object]:
    """Parse a command line as its command does, and return what it reads; there is always something to resume."""
    own_space(tmp_path)
    monkeypatch.chdir(tmp_path)

    def saved_config(storage_path: str, name: str | None) -> tuple[RunConfig, SearchSpace]:
        run = RunConfig.from_preset("quick", storage_path=storage_path, name=name)
        return run, space_of(run)

    monkeypatch.setattr("nkat_ray.commands.tune.saved_config", saved_config)
    monkeypatch.setattr("nkat_ray.commands.train.saved_training", lambda out: TrainConfig(out=out))
    monkeypatch.setattr(
        "nkat_ray.commands.evaluate.with_defaults_of", lambda target, official: EvaluateConfig(target=target)
    )

    def read(name: str, argv: list[str]) -> object:
        command = importlib.import_module(f"nkat_ray.commands.{name}")
        return (command.read if hasattr(command, "read") else command.PROGRAM.configured)(argv)

    return read


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
    listed = re.findall(r"^\| `nkat (\w+)` \|", (ROOT / "docs/howto/commands.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(cli.COMMANDS)


def test_the_costs_of_the_presets_are_those_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    (block,) = code_blocks(page, "python")
    exec(compile(block, "docs/cluster.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PRESETS)
    for line in lines:
        assert line in page


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
    r"nkat stop": "needs a run in progress: test_tune.py has one",
    r"python -m uv|python -m pip|python benchmarks/": "installs, or measures for minutes",
}
LIGHTER = {  # what a Python block is changed to, so that it takes seconds
    "val_images=5000, train_images=None": "val_images=50, train_images=64",
    "epochs=10, warmup=1": "epochs=1, warmup=0",
}


def steps(document: Path) -> Iterator[tuple[str, str]]:
    """Yield the steps of a document in order: ("python", a block) or ("bash", a line)."""
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL):
        yield from [(language, block)] if language == "python" else ((language, line) for line in block.splitlines())


def runnable(line: str) -> list[str] | None:
    """Return the words of a command that a test can run in a minute; None for any other line."""
    line = re.sub(r".*&& |\S*\buv run ", "", line)
    ours = line.startswith(("nkat ", "python tune_round2.py", "python -c"))
    if not ours or any(re.match(pattern, line) for pattern in NOT_RUN):
        return None
    return [str(Path(word).expanduser()) if word.startswith("~") else word for word in shlex.split(line)]


@pytest.fixture
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tinted: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> Path:
    """Set up a reader's machine as the working directory: a home with photos, a few CIFAR-10 images, finished runs."""
    from fake_runs import build_run

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
    config = TrialConfig(embed_dim=16, num_heads=2, depth=2, val_images=40)
    model = create_nkat_vit(config, num_classes=10)
    weights = Weights(
        config=config, dataset="cifar10", num_classes=10, grey=False, mean=(0.5,) * 3, std=(0.25,) * 3, epoch=3,
        val_accuracy=0.25, seed=0, tensors=model.state_dict(),
    )  # fmt: skip
    for name in (RUN_FOLDER, "runs/laptop-1", "runs/laptop-2", "runs/first"):
        build_run(tmp_path / name)
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
            assert cli.run_command(name, argv) == 0, text
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


@pytest.mark.parametrize(("page", "original"), JAPANESE.items())
def test_the_japanese_pages_give_the_same_commands(page: str, original: str) -> None:
    text, english = ((ROOT / name).read_text() for name in (page, original))
    for language in ("bash", "powershell"):
        assert code_blocks(text, language) == code_blocks(english, language)
    assert text.count("\n## ") == english.count("\n## ")
    assert len(re.findall(r"^\|", text, re.MULTILINE)) == len(re.findall(r"^\|", english, re.MULTILINE))


@pytest.mark.parametrize("page", JAPANESE)
def test_no_line_of_a_japanese_page_ends_inside_a_sentence(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^[^#|\-\n].*\n(?=[^#|\-\n])", prose, re.MULTILINE) == []


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
    assert list(space_of(run).domains) == ["conv_stem", "embed_dim", "lr", "top_k"]


# --- files ------------------------------------------------------------------------------------------------------------


def tree() -> set[str]:
    """Return the paths of the file tree in docs/architecture.md; folders end in a slash."""
    (block,) = code_blocks(section((ROOT / "docs/architecture.md").read_text(), "What is where"), "")
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


def test_the_tree_names_every_folder_of_the_package_and_nothing_that_is_not_there() -> None:
    folders = {f"nkat_ray/{path.parent.name}/" for path in (ROOT / "nkat_ray").glob("*/__init__.py")}
    files = {f"nkat_ray/{path.name}" for path in (ROOT / "nkat_ray").glob("*.py") if path.name != "__init__.py"}
    assert folders | files <= tree()
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def defined_in(path: Path) -> set[str]:
    """Return the functions, classes and methods (`Class.method`) that a file defines."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            members = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{member.name}" for member in members if isinstance(member, ast.FunctionDef)}
    return found


def test_the_architecture_names_functions_that_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(named) >= 20
    folders = (ROOT, ROOT / "nkat_ray")
    for file, name in named:
        (path,) = [folder / file for folder in folders if (folder / file).exists()]
        assert name in defined_in(path), f"{file}:{name}"


def test_the_troubles_name_tests_that_exist_and_stand_below_their_sources() -> None:
    text = (ROOT / "docs/troubles.md").read_text()
    rows = [line for line in text.splitlines() if "::" in line]
    assert len(rows) >= 30
    for row in rows:
        sources = re.findall(r"\[([\w.-]+/[\w.-]+)#(\d+)\]\(https://github\.com/\1/(?:issues|pull)/\2\)", row)
        assert len(sources) == row.count("https://"), row
        assert bool(sources) != row.endswith("| none found |"), row
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row):
            assert name in defined_in(ROOT / file), f"{file}::{name}"
            above = (ROOT / file).read_text().split(f"def {name}(")[0].rpartition("\ndef ")[2]
            assert [source for source in sources if "#".join(source) not in above] == [], f"{file}::{name}"


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_anchors_are_headings(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text())
    targets = [(document.parent / file if file else document, anchor) for file, anchor in links]
    assert [anchor for path, anchor in targets if anchor not in anchors(path.read_text())] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []  # pictures too


def test_every_cell_of_the_comparison_has_a_source() -> None:
    text = (ROOT / "docs/comparison.md").read_text()
    sources = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", text, re.MULTILINE))
    owners = {
        "Frameworks and services": "nrpswd",
        "Optimisers and AutoML": "neafhk",
    }  # first letters of a column's sources
    for heading, letters in owners.items():
        rows = [
            line.strip("|").split("|") for line in section(text, heading).splitlines() if re.match(r"\| [^-|]", line)
        ]
        assert len(rows) >= 9
        for _, *cells in rows:
            for owner, cell in zip(letters, cells, strict=True):
                found = re.findall(r"\]\[([\w-]+)\]", cell)
                assert found, cell
                assert {name[0] for name in found} == {owner}, cell
                assert re.sub(r"\[.*?\]\[.*?\]|[*,; ]", "", cell) == "", f"said without a source: {cell}"
    used = set(re.findall(r"\]\[([\w-]+)\]", text))
    assert used == set(sources)
    assert [to for to in sources.values() if "://" not in to and not (ROOT / "docs" / to).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README) <= 9000


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert nkat_ray.__version__ == project["version"]
    assert re.search(rf"^## \[{project['version']}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_readme_shows_pictures_that_are_pictures() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert shown
    for name in shown:
        with Image.open(ROOT / name) as picture:
            assert picture.width >= 400
        assert (ROOT / name).stat().st_size < 600_000


# --- figures and names ------------------------------------------------------------------------------------------------


def plain(cell: str) -> str | float | None:
    """Return a table's cell as the configuration has it; whatever follows a space is for people."""
    word = cell.split(" ")[0]
    try:
        return float(word)
    except ValueError:
        return None if word == "off" else word


def test_the_presets_table_has_the_presets_values() -> None:
    rows = re.findall(
        r"^\| `(\w+)`.*?" + r" \| (.+?)" * len(PRESETS) + r" \|$",
        section((ROOT / "docs/howto/search.md").read_text(), "The presets"),
        re.MULTILINE,
    )
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


@pytest.mark.parametrize(("folder", "preset", "passed", "of"), [("headline", "gpu", 1, 4), ("laptop", "laptop", 3, 5)])
def test_the_figures_of_a_preset_are_those_of_its_files(folder: str, preset: str, passed: int, of: int) -> None:
    results = ROOT / "benchmarks" / folder
    rows = pq.read_table(results / "stage2.parquet").to_pylist()
    trials = pq.read_table(results / "trials.parquet").to_pylist()
    global_tpe = f"{np.mean([row['tpe'] for row in rows]):.3f}"
    accuracies = [f"{row['test_accuracy']:.3f}" for row in rows]
    assert (sum(row["passed_gate"] for row in trials), len(trials)) == (passed, of)
    for page in ("README.md", "README.ja.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [figure for figure in (global_tpe, *accuracies) if figure not in text] == [], page
    assert global_tpe in EXPECTED[preset]


def test_the_headlines_run_is_the_preset_gpu() -> None:
    saved = json.loads((ROOT / "benchmarks/headline/config.json").read_text(encoding="utf-8"))
    preset = dataclasses.asdict(RunConfig.from_preset("gpu"))
    differing = {name for name, value in preset.items() if saved[name] != json.loads(json.dumps(value, default=str))}
    assert differing == {"preset", "space", "name", "storage_path", "data_dir", "gpus_per_trial", "cpus_per_trial"}
    assert (saved["gpus_per_trial"], saved["cpus_per_trial"]) == (0.25, 4)
    searched = {name: domain for name, domain in saved["own_space"].items() if name not in saved["fixed"]}
    assert searched == {name: dataclasses.asdict(domain) for name, domain in SPACES["gpu"].items()}
