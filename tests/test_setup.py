"""The set-up files: what make and scripts/environment say, above all where they must refuse."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GIB_IN_KB = 1024 * 1024
# All that scripts/environment may call before it has a Python.
TOOLS = ["awk", "bash", "cat", "cksum", "dirname", "head", "ln", "readlink", "rm", "sleep"]


def executable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def bare_machine(tmp_path: Path) -> Path:
    """A checkout in a folder with a space in its name, beside a `bin` that holds only TOOLS."""
    checkout = tmp_path / "a checkout"
    (checkout / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/environment"):
        shutil.copy(ROOT / name, checkout / name)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found, f"this machine has no {name}"
        (commands / name).symlink_to(found)
    fake_disk(commands, free_gib=100)
    return checkout


def fake_python(commands: Path, name: str, version: str, *, has_venv: bool = True) -> None:
    """An interpreter that tells its version and whether it can import venv, and no more."""
    executable(
        commands / name,
        f"""#!{shutil.which("bash")}
case "$*" in
  *version_info*) echo {version} ;;
  *ensurepip*) exit {0 if has_venv else 1} ;;
  *) echo "asked for more than was expected: $*" >&2; exit 99 ;;
esac
""",
    )


def fake_disk(commands: Path, *, free_gib: float) -> None:
    free = int(free_gib * GIB_IN_KB)
    executable(
        commands / "df",
        f"""#!{shutil.which("bash")}
echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'
echo '/dev/a disk 209715200 1000 {free} 98% /a mount point'
""",
    )


def make_environment(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash
    return subprocess.run(
        [bash, str(checkout / "scripts" / "environment")],
        env={"PATH": str(checkout.parent / "bin"), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def refused(checkout: Path, **variables: str) -> str:
    """What scripts/environment said when it refused, leaving nothing behind."""
    before = sorted(checkout.rglob("*"))
    result = make_environment(checkout, **variables)
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert sorted(checkout.rglob("*")) == before
    return result.stderr


def test_an_old_python_is_refused_with_its_version_the_needed_one_and_what_to_do(
    bare_machine: Path,
) -> None:
    fake_python(bare_machine.parent / "bin", "python3", "3.9.18")
    said = refused(bare_machine)
    assert "needs Python 3.11 or newer" in said
    assert "python3 is 3.9.18" in said
    assert "hint: install Python 3.11" in said


def test_a_machine_without_python_is_told_which_names_were_looked_for(bare_machine: Path) -> None:
    said = refused(bare_machine)
    assert "Found none" in said
    assert "python3.11 python3.12 python3.13 python3 python" in said


def test_python_3_10_is_one_version_too_old(bare_machine: Path) -> None:
    fake_python(bare_machine.parent / "bin", "python3", "3.10.14")
    assert "python3 is 3.10.14" in refused(bare_machine)


def test_the_interpreter_named_by_the_user_is_the_only_one_tried(bare_machine: Path) -> None:
    fake_python(bare_machine.parent / "bin", "python3.11", "3.11.9")
    fake_python(bare_machine.parent / "bin", "old", "3.8.1")
    assert "Found: old is 3.8.1." in refused(bare_machine, PYTHON="old")


def test_a_python_without_venv_is_refused_with_the_package_that_brings_it(
    bare_machine: Path,
) -> None:
    fake_python(bare_machine.parent / "bin", "python3", "3.12.3", has_venv=False)
    said = refused(bare_machine)
    assert "python3 3.12.3" in said
    assert "python3-venv" in said


def test_a_nearly_full_disk_is_refused_with_the_room_found_and_the_room_needed(
    bare_machine: Path,
) -> None:
    commands = bare_machine.parent / "bin"
    fake_python(commands, "python3", "3.9.18")
    fake_python(commands, "python3.12", "3.12.3")
    fake_disk(commands, free_gib=0.5)
    said = refused(bare_machine)
    assert "using python3.12 (3.12.3)" in said
    assert "need about 4 GB" in said
    assert "512 MB are free" in said
    assert "hint: free some space" in said


def test_an_environment_whose_install_was_cut_short_is_made_again(bare_machine: Path) -> None:
    commands = bare_machine.parent / "bin"
    fake_python(commands, "python3.11", "3.11.9")
    (bare_machine / ".venv" / "bin").mkdir(parents=True)
    fake_python(bare_machine / ".venv" / "bin", "python", "3.11.9")
    ended = subprocess.Popen(["true"])
    ended.wait()
    (bare_machine / ".venv.lock").symlink_to(str(ended.pid))
    said = make_environment(bare_machine).stderr
    assert "making .venv (the last install was cut short)" in said
    assert "-m venv .venv" in said
    assert not (bare_machine / ".venv").exists()


def test_make_alone_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    make = shutil.which("make")
    assert make
    listed = subprocess.run([make, "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert listed.returncode == 0, listed.stderr
    lines = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    assert {words[1] for words in lines} == set(phony[1].split())
    assert {"demo", "test", "check"} <= {words[1] for words in lines}
    assert all(len(words) == 3 for words in lines), "a target without its description"


def test_constraints_pin_exact_versions_and_name_no_host_or_path() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    wrong = [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin)]
    assert wrong == []
    assert "://" not in text and "/" not in text and "+" not in text
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(set(names)) == len(names)
    assert "fairlead" not in names


def test_constraints_pin_everything_that_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    # vllm needs an accelerator and chooses its own torch, so it is in no tested environment.
    asked = project["dependencies"] + [r for n, e in extras.items() if n != "vllm" for r in e]
    names = {re.split(r"[^A-Za-z0-9_-]", requirement)[0] for requirement in asked} - {"fairlead"}
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    pinned = {line.split("==")[0] for line in text.splitlines()}
    assert sorted(names - pinned) == []
