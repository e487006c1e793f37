"""Flags: what is read from them, what is refused in one line, and the help."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from nkat_ray.cli import COMMANDS
from nkat_ray.commands import data, tune
from nkat_ray.commands.train import TrainConfig
from nkat_ray.commands.train import read as read_training
from nkat_ray.config import RunConfig, field_names
from nkat_ray.errors import UserError
from nkat_ray.fields import Checked, NoneWord, Positional, Range
from nkat_ray.flags import Program, continued, help_page


@dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """One field of each kind."""

    target: Annotated[tuple[Path, ...], Positional()] = ()
    """Where. The rest of it."""
    count: Annotated[int, Range(ge=1, le=9)] = 3
    """How many. More on it."""
    share: Annotated[float, Range(gt=0, le=1)] = 0.5
    """What part."""
    limit: Annotated[int | None, NoneWord("off"), Range(ge=1)] = None
    """At most."""
    pair: Annotated[tuple[int, int] | None, NoneWord("off")] = (2, 9)
    """Two numbers."""
    kind: Literal["cat", "dog", 3] = "cat"
    """Which."""
    names: tuple[str, ...] = ("a", "b")
    """Some words."""
    out: Path | None = None
    """A folder."""
    text: str = ""
    """Anything."""
    flag: bool = False
    """Whether."""
    two_words: bool = True
    """Whether or not."""


PROGRAM = Program(
    name="prog", config=Config, summary="Try flags.", groups={"First": ("target", "count", "two_words")},
    more={"Second": ("share", "limit", "pair", "kind", "names", "out", "text", "flag")}, examples=("prog --count 4",),
    removed={"--old": "use --kind", "--kind bird": "use --kind cat"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("", {}),
        ("--count 4", {"count": 4}),
        ("--count=4 --count 5", {"count": 5}),
        ("--share 1e-3", {"share": 1e-3}),
        ("--share -inf", {"share": float("-inf")}),
        ("--count -1", {"count": -1}),  # the configuration refuses it, not the reader
        ("--limit off", {"limit": None}),
        ("--limit 7", {"limit": 7}),
        ("--pair 1 2", {"pair": (1, 2)}),
        ("--pair off", {"pair": None}),
        ("--kind dog", {"kind": "dog"}),
        ("--kind 3", {"kind": 3}),
        ("--names x y z", {"names": ("x", "y", "z")}),
        ("--names", {"names": ()}),
        ("--out a/b", {"out": Path("a/b")}),
        ("--flag", {"flag": True}),
        ("--no_flag --no-two-words", {"flag": False, "two_words": False}),
        ("one two --flag", {"target": (Path("one"), Path("two")), "flag": True}),
        ("--text=--count", {"text": "--count"}),
    ],
)
def test_flags_become_values(typed: str, values: dict[str, Any]) -> None:
    assert PROGRAM.read(typed.split()) == values


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count", "high"], "count is 'high'; allowed: a whole number, 1..9"),
        (["--count", "4.0"], "count is '4.0'; allowed: a whole number, 1..9"),
        (["--count"], "--count needs a value; allowed: a whole number, 1..9"),
        (["--two-words=yes"], "--two_words takes no value; type --two_words or --no_two_words"),
        (["--pair", "1"], "pair is '1'; allowed: (a whole number; a whole number), or off"),
        (["--pair", "1", "x"], "pair is 'x'; allowed: a whole number"),
        (["--kind", "cow"], "kind is 'cow'; allowed: cat, dog, 3"),
        (["--kind", "dgo"], "kind is 'dgo'; allowed: cat, dog, 3; did you mean dog?"),
        (["--out", ""], "out is ''; it is empty; allowed: a path, or None"),
        (["--out", "a\0b"], "out is 'a\\x00b'; it contains a NUL byte; allowed: a path, or None"),
        (
            ["--out", "\udce5"],
            "out is '\\udce5'; it is not in utf-8, Python's encoding of names here; allowed: a path, or None",
        ),
        (["--cuont", "4"], "there is no flag --cuont; did you mean --count?"),
        (["--zzz=4"], "there is no flag --zzz; `prog --help` lists the flags"),
        (["--flag", "yes", "--", "-x"], None),
        (["--old"], "--old was removed; use --kind"),
        (["--old=3"], "--old was removed; use --kind"),
        (["--kind", "bird"], "--kind bird was removed; use --kind cat"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(words: Sequence[str], said: str | None) -> None:
    if said is None:  # a positional field takes what belongs to no flag
        assert PROGRAM.read(words)["target"][0] == Path("yes")
        return
    with pytest.raises(UserError) as caught:
        PROGRAM.read(words)
    assert str(caught.value) == said


def test_a_word_that_belongs_to_no_flag_is_refused() -> None:
    with pytest.raises(UserError, match="'quick' belongs to no flag"):
        tune.read(["quick"])


def test_a_missing_positional_is_named() -> None:
    with pytest.raises(UserError, match="required: folder; `nkat data import --help`"):
        data.read(["import", "--out", "x", "--name", "y"])


def test_what_goes_on_keeps_its_flags() -> None:
    saved = Config(count=4)
    assert continued(saved, {"count": 4, "text": "new"}, ("text",)) == Config(count=4, text="new")
    with pytest.raises(UserError, match=r"count is 5; what is to be resumed has 4; leave it out"):
        continued(saved, {"count": 5}, ("text",))


def test_both_spellings_of_a_flag_are_read() -> None:
    run, space = tune.read(
        ["--preset=quick", "--num-samples", "3", "--max_concurrent=2", "--no_split_heads", "--top-k=4"]
    )
    assert (run.preset, run.num_samples, run.max_concurrent, run.top_k) == ("quick", 3, 2, 4)
    assert space.fixed == ()  # top_k is not in this space


def test_the_notes_command_is_read_as_written() -> None:
    command = (
        "--dataset cifar10 --conv_stem tiny --patch_size 2 --embed_dim 384 --depth 7 --temperature 0.65 --top_k 6 "
        "--top_p 0.80 --nkat_strength 0.0024 --nkat_decay 0.99 --dropout_attn 0.17 --dropout_embed 0.08 --mixup 0.1 "
        "--cutmix 0.2 --randaugment 2 9 --lr 2e-4 --epochs 40 --warmup 5 --ema 0.9995 --clip_grad 1.0"
    )
    assert read_training(command.split()) == TrainConfig()


def test_off_is_none() -> None:
    names = ("top_k", "top_p", "randaugment", "cutout", "ema", "clip_grad")
    config = read_training([word for name in names for word in (f"--{name}", "off")])
    assert {getattr(config, name) for name in names} == {None}


# Reported in rclone/rclone#4239
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gate_projection"], "--gate_projection was removed; early stopping does its work: --scheduler asha"),
        (["--objective", "local_tpe,lambda"], "--objective was removed; Local TPE is the only objective: leave it out"),
        (["--scheduler", "hyperband"], "--scheduler hyperband was removed; use --scheduler asha"),
        (["--scheduler=median"], "--scheduler median was removed; use --scheduler asha"),
        (["--sampler", "nsga2"], "--sampler nsga2 was removed; use --sampler tpe"),
        (["--preset", "quikc"], "preset is 'quikc'; allowed: quick, laptop, gpu, round2; did you mean quick?"),
        (
            ["--space", "extnded"],
            "space is 'extnded'; allowed: round2, extended, laptop, gpu, quick, or a file NAME.toml; "
            "did you mean extended?",
        ),
        (["--data_dir", ""], "data_dir is ''; it is empty; allowed: a path, or None"),
    ],
)  # fmt: skip
def test_a_search_refuses_what_is_gone_or_misspelt(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        tune.read(words)
    assert str(caught.value) == said


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["-h", "--help", "--help_all", "--help-all"])
def test_help_ends_the_program(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        PROGRAM.read(["--count", "wrong", word])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: prog TARGET [flags]")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from nkat_ray import __version__

    with pytest.raises(SystemExit):
        tune.read(["--version"])
    assert capsys.readouterr().out == f"nkat-ray {__version__}\n"


def test_the_short_help_has_groups_first_sentences_and_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_page(PROGRAM).splitlines()
    assert [line for line in lines if line.endswith(":")] == ["First:", "Examples:"]
    assert any(line.split() == ["--count", "N", "How", "many", "[3]"] for line in lines)
    assert "--share" not in help_page(PROGRAM)
    assert lines[-1] == "`--help_all` shows 8 more flags, all details and ranges."


def test_the_whole_help_has_every_flag_with_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(help_page(PROGRAM, everything=True).split())
    for part in (
        "How many. More on it. (1..9) [3]",
        "--limit N|off At most. (>= 1) [off]",
        "--kind cat|dog|3",
        "--pair N N|off",
    ):
        assert part in text


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "data"])
def test_every_flag_of_a_command_is_in_its_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = importlib.import_module(f"nkat_ray.commands.{command}").PROGRAM
    listed = [name for names in [*program.groups.values(), *program.more.values()] for name in names]
    assert sorted(listed or field_names(program.config)) == sorted(field_names(program.config))
    monkeypatch.setenv("COLUMNS", "80")
    page = help_page(program)
    assert page.count("\n") < 60
    assert max(map(len, page.splitlines())) <= 80
    assert "Examples:" in page


def test_a_search_has_fewer_flags_than_before_and_its_help_has_headings() -> None:
    assert len(field_names(RunConfig)) < 71  # as many as there were before
    assert list(tune.PROGRAM.groups) == ["Start here", "Search", "Budget", "Stage 2", "Output"]
    hidden = {name for names in tune.PROGRAM.more.values() for name in names}
    assert {"conv_stem", "lr", "mixup", "top_k"} <= hidden
