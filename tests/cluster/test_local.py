"""A local instance's folder and token on machines that lack what Ray takes for granted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from nkat_ray.cluster import local
from nkat_ray.cluster.local import LOCK_FILE, LONGEST_PLACE, ensure_token, own_folder, place_for_ray
from nkat_ray.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wishes in the environment."""
    for name in ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def temporary(folder: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python's temporary files go there."""
    monkeypatch.setattr("tempfile.tempdir", str(folder))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short folder that temporary files go to."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    temporary(folder, monkeypatch)
    return folder


# --- the folder -------------------------------------------------------------------------------------------------------


def test_temporary_files_decide_where_the_folder_is(short: Path) -> None:
    assert place_for_ray() == short


# Reported in ray-project/ray#7945, verl-project/verl#1120, aertslab/pycisTopic#93
def test_a_temporary_folder_that_is_too_long_for_sockets_gives_way_to_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch systems give such folders."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    temporary(deep, monkeypatch)
    assert place_for_ray() == Path("/tmp")
    with own_folder() as folder:
        assert len(f"{folder}{'x' * local.RAYS_PART}") <= local.LONGEST_SOCKET


def test_on_windows_a_long_temporary_folder_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Ray's sockets have no path there, and `C:\Users\<name>\AppData\Local\Temp` is long."""
    (tmp_path / ("x" * 100)).mkdir()
    temporary(tmp_path / ("x" * 100), monkeypatch)
    monkeypatch.setattr(sys, "platform", "win32")
    assert place_for_ray() == tmp_path / ("x" * 100)


def test_rays_own_name_for_a_session_is_as_long_as_it_is_taken_to_be() -> None:
    """Ray's pattern, with the largest number that a process can have."""
    from ray._private import node

    source = Path(node.__file__).read_text()
    assert 'f"session_{date_str}_{os.getpid()}"' in source
    assert '"%Y-%m-%d_%H-%M-%S_%f"' in source


# Reported in ray-project/ray#7945
def test_a_folder_that_the_user_names_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(
        UserError, match=r"/proc/nowhere cannot be written \(No such file.*set RAY_TMPDIR to a writable folder"
    ):
        place_for_ray()
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 60)
    with pytest.raises(UserError, match=f"has 61 bytes.*at most {LONGEST_PLACE} bytes"):
        place_for_ray()


def test_where_nothing_can_be_written_every_place_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    temporary("/proc/a", monkeypatch)
    monkeypatch.setattr(local, "USUAL_PLACES", ("/proc/b", "/proc/c"))
    with pytest.raises(UserError, match=r"/proc/a cannot .* /proc/b cannot .* /proc/c cannot"):
        place_for_ray()


# Reported in verl-project/verl#5555
def test_the_folder_goes_with_its_instance_and_stays_after_a_fault(short: Path) -> None:
    with own_folder() as folder:
        (folder / "session").mkdir()
    assert not folder.exists()
    for interruption in (KeyboardInterrupt, UserError):
        with pytest.raises(interruption), own_folder() as folder:
            raise interruption
        assert not folder.exists()
    with pytest.raises(RuntimeError), own_folder() as folder:
        raise RuntimeError
    assert folder.exists()  # Ray's logs are in it,
    with own_folder():
        assert not folder.exists()  # until the next start


# Reported in verl-project/verl#5555
def test_what_a_killed_driver_left_is_removed_and_what_a_living_one_has_is_not(short: Path) -> None:
    dead, alive, other = short / "nkat-dead", short / "nkat-alive", short / "nkat-other"
    for folder in (dead, alive, other):
        folder.mkdir()
    (dead / LOCK_FILE).touch()
    with FileLock(alive / LOCK_FILE), own_folder():
        assert (dead.exists(), alive.exists(), other.exists()) == (False, True, True)


# --- the token --------------------------------------------------------------------------------------------------------


def token_after(home: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The token that is in the environment afterwards, in a home."""
    monkeypatch.setenv("HOME", str(home))
    before = dict(os.environ)
    try:
        ensure_token()
        return os.environ.get("RAY_AUTH_TOKEN")
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_home_without_a_token_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = token_after(tmp_path, monkeypatch)
    assert token is not None
    assert len(bytes.fromhex(token)) == 32
    assert token != token_after(tmp_path, monkeypatch)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_a_token_file_that_holds_none_is_not_used(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_bytes(content)
    assert token_after(tmp_path, monkeypatch) is not None


def test_the_users_own_token_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("a" * 64)
    assert token_after(tmp_path, monkeypatch) is None
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    assert token_after(Path("/proc"), monkeypatch) == "b" * 64


def test_whoever_wants_no_token_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token_after(tmp_path, monkeypatch) is None


# --- real instances ---------------------------------------------------------------------------------------------------

START = """
import ray, sys
from nkat_ray.cluster.connect import connected, refuse_no_ray
refuse_no_ray("local")
with connected("local"):
    assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
    print("runs in", ray._private.worker._global_node.get_session_dir_path())
"""
NO_ENTRY = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /etc/passwd && exec "$@"', "sh"]
OTHERS_RAY = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro tmpfs /tmp/ray && exec "$@"', "sh"]


def started(folder: Path, *prefix: str, **environment: str | None) -> str:
    """What a process says that starts a local instance under these conditions."""
    changed = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment}
    given = {name: value for name, value in changed.items() if value is not None and not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [*prefix, sys.executable, "-c", START], env=given, cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(folder.iterdir()) == []
    return done.stdout


# Reported in open-mmlab/mim#240
@pytest.mark.cluster
@pytest.mark.parametrize("home", ["/proc", "/dev/null", "/nonexistent"])
def test_ray_starts_with_a_home_that_cannot_be_written(home: str, tmp_path: Path) -> None:
    assert "runs in" in started(tmp_path, HOME=home)


@pytest.mark.cluster
def test_ray_starts_for_a_user_without_a_home_and_without_an_entry(tmp_path: Path) -> None:
    """As in a container that is given a number for its user."""
    if subprocess.run([*NO_ENTRY, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts in a namespace (unshare --mount)")
    assert "runs in" in started(tmp_path, *NO_ENTRY, HOME=None)


# Reported in ray-project/ray#7945, verl-project/verl#1120, aertslab/pycisTopic#93
@pytest.mark.cluster
def test_ray_starts_with_a_temporary_folder_of_a_hundred_characters(tmp_path: Path, tmp_path_factory: object) -> None:
    deep = tmp_path.parent / ("x" * 100)
    deep.mkdir(exist_ok=True)
    assert "runs in /tmp/nkat-" in started(tmp_path, TMPDIR=str(deep))


# Reported in ray-project/ray#4593, ray-project/ray#3899, ray-project/ray#32776, vllm-project/vllm#3513
@pytest.mark.cluster
def test_ray_starts_although_rays_usual_folder_is_another_users(tmp_path: Path) -> None:
    Path("/tmp/ray").mkdir(exist_ok=True)
    if subprocess.run([*OTHERS_RAY, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts in a namespace (unshare --mount)")
    assert "runs in /tmp/nkat-" in started(tmp_path, *OTHERS_RAY, TMPDIR="/tmp")


# Reported in verl-project/verl#5555
@pytest.mark.cluster
def test_nothing_of_a_local_instance_stays(tmp_path: Path, short: Path) -> None:
    assert f"runs in {short}/nkat-" in started(tmp_path, TMPDIR=str(short))
    assert [path for path in short.iterdir() if not path.name.startswith("torchinductor_")] == []  # PyTorch's cache
