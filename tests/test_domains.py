"""A search space from a file: what is read, and that everything else is refused in one line."""

import dataclasses
import json
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from nkat_ray.cli import parse, tune
from nkat_ray.config import SPACES, RunConfig, TrialConfig, field_names, searchable
from nkat_ray.domains import Choice, Span, domain_of_json, read_space
from nkat_ray.prepare import config_of_json
from nkat_ray.report.tables import plain
from nkat_ray.search.space import baseline_point, contains, distribution, domains, refuse_impossible, round1_point

EVERYTHING = """
conv_stem = ["off", "tiny"]        # a list: one of these
stem_stride = [4, 2]
depth = { low = 2, high = 6 }      # whole numbers: the step is 1
embed_dim = { low = 64, high = 128, step = 32 }
lr = { low = 1e-4, high = 1e-2, log = true }
temperature = { low = 1, high = 2 }
top_k = [4, "off"]
top_p = { low = 0.5, high = 1.0 }
clip_grad = ["off", 1, 0.5]
split_heads = [true, false]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(EVERYTHING)
    return path


def test_lists_and_bounds_become_domains(file: Path) -> None:
    space = read_space(file, searchable())
    assert space == {
        "conv_stem": Choice(("off", "tiny")),
        "stem_stride": Choice((4, 2)),
        "depth": Span(2, 6, step=1),
        "embed_dim": Span(64, 128, step=32),
        "lr": Span(1e-4, 1e-2, log=True),
        "temperature": Span(1.0, 2.0),
        "top_k": Choice((4, None)),
        "top_p": Span(0.5, 1.0),
        "clip_grad": Choice((None, 1.0, 0.5)),
        "split_heads": Choice((True, False)),
    }
    drawn = {name: distribution(domain) for name, domain in space.items()}
    assert drawn["embed_dim"] == IntDistribution(64, 128, step=32)
    assert drawn["lr"] == FloatDistribution(1e-4, 1e-2, log=True)
    assert drawn["top_k"] == CategoricalDistribution((4, None))


@pytest.mark.parametrize("name", SPACES)
def test_every_space_of_the_package_can_be_written_as_a_file(name: str, tmp_path: Path) -> None:
    def said(value: object) -> str:
        return '"off"' if value is None else json.dumps(value)

    lines = []
    for key, domain in SPACES[name].items():
        if isinstance(domain, Choice):
            lines.append(f"{key} = [{', '.join(map(said, domain.values))}]")
        else:
            more = f", step = {domain.step}" if domain.step else f", log = {said(domain.log)}"
            lines.append(f"{key} = {{ low = {domain.low}, high = {domain.high}{more} }}")
    path = tmp_path / "copy.toml"
    path.write_text("\n".join(lines))
    assert RunConfig(space=str(path)).domains == SPACES[name]


BAD = {
    "no such file": (None, "cannot be read"),
    "no TOML": ("depth = = 3", "no TOML"),
    "no text": (b"\xff\xfe", "no TOML"),
    "empty": ("# nothing", "names no parameter"),
    "unknown": ("dept = [3]", "did you mean depth"),
    "far from all": ("xyzzy = [3]", "allowed: conv_stem"),
    "epochs": ("epochs = [3, 4]", "'epochs' cannot be searched"),
    "the images": ("val_images = [300, 400]", "cannot be searched"),
    "a single value": ("depth = 3", "give a list of values"),
    "no value": ("depth = []", "at least one value"),
    "twice the same": ("depth = [3, 3]", "each once"),
    "another type": ("depth = [3, 4.0]", "4.0 is not of its type"),
    "truth for a number": ("depth = [true]", "not of its type"),
    "off where it cannot be": ('depth = ["off"]', "'off' is not of its type"),
    "no such stem": ('conv_stem = ["huge"]', "allowed: off, tiny, small"),
    "no such stride": ("stem_stride = [3]", "allowed: 2, 4"),
    "bounds of words": ("conv_stem = { low = 1, high = 2 }", "no bounds"),
    "bounds of a literal": ("stem_stride = { low = 2, high = 4 }", "no bounds"),
    "bounds of truth": ("split_heads = { low = 0, high = 1 }", "no bounds"),
    "one bound": ("depth = { low = 2 }", "low and high"),
    "another key": ("depth = { low = 2, high = 4, log = true }", "low and high, and step"),
    "a step for a fraction": ("top_p = { low = 0.5, high = 1.0, step = 1 }", "low and high, and log"),
    "upside down": ("depth = { low = 4, high = 2 }", "low must be below high"),
    "nan": ("top_p = { low = nan, high = 1.0 }", "low must be below high"),
    "infinite": ("lr = { low = 0.1, high = inf }", "low must be below high"),
    "a log from zero": ("lr = { low = 0.0, high = 0.1, log = true }", "low > 0"),
    "a step that does not divide": ("depth = { low = 2, high = 5, step = 2 }", "step must divide"),
    "no step": ("depth = { low = 2, high = 5, step = 0 }", "step must divide"),
    "too many steps": ("batch_size = { low = 1, high = 4096 }", "fewer than 64"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_one_line(text: str | bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="space") as caught:
        RunConfig(space=str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_space_that_is_neither_known_nor_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"space is 'round3'; allowed: round2, extended, quick, or a file NAME\.toml"):
        RunConfig(space="round3")


def test_the_command_line_takes_a_file_and_refuses_it_before_anything_is_written(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = parse(RunConfig, ["--space", str(file), "--depth", "3"], prog="nkat", default=RunConfig.from_preset("quick"))
    assert set(domains(run, {"depth"})) == set(run.domains) - {"depth"}
    assert run.domains["depth"] == Span(2, 6, step=1)
    file.write_text("depth = { low = 2, high = 600, step = 299 }")  # a domain, but no depth that the model has
    before = sorted(tmp_path.iterdir())
    assert tune(["--space", str(file), "--storage_path", str(tmp_path), "--preset", "quick"]) == 2
    error = capsys.readouterr().err
    assert "depth is" in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_keeps_its_space_whatever_becomes_of_the_file(file: Path) -> None:
    run = RunConfig.from_preset("quick", space=str(file))
    saved = json.loads(json.dumps(plain(dataclasses.asdict(run))))
    file.unlink()
    again = config_of_json(saved)
    assert again == run
    assert parse(RunConfig, ["--space", str(file)], prog="nkat", default=again) == run  # as --resume parses
    assert dataclasses.replace(run, space="quick").own_space is None
    assert {name: domain_of_json(domain) for name, domain in saved["own_space"].items()} == run.domains


def test_the_first_two_trials_lie_in_a_space_that_has_neither(tmp_path: Path) -> None:
    path = tmp_path / "far.toml"
    path.write_text('conv_stem = ["small"]\ndepth = { low = 12, high = 14 }\ntop_k = { low = 2, high = 3 }\nlr = [0.5]')
    run = RunConfig(space=str(path), top_k=None)
    refuse_impossible(run, ())
    for point in (baseline_point(run, run.domains), round1_point(run, run.domains)[0]):
        assert all(contains(run.domains[name], value) for name, value in point.items())
    assert baseline_point(run, run.domains) == {"conv_stem": "small", "depth": 12, "top_k": 2, "lr": 0.5}


def test_what_may_be_searched_is_of_the_trial() -> None:
    assert set(searchable()) < set(field_names(TrialConfig))
    assert set().union(*SPACES.values()) <= set(searchable())
