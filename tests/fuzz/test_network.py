"""No byte leaves the machine unless a recipe names something on the hub: the demonstration with sockets forbidden."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FORBID = """
import sys

def forbid(event, arguments):
    remote = event in ("socket.getaddrinfo", "socket.gethostbyname") or (
        event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple)
    )
    if remote:
        with open(LOG, "a") as file:
            file.write(f"{event} {arguments[1:]}\\\\n")
        raise OSError(f"forbidden: {event}")

sys.addaudithook(forbid)
"""
DEMO = """
import sys
from pathlib import Path

from fairlead.cli import main
from fairlead.demo.site import write_dump

folder = Path(sys.argv[1])
write_dump(folder / "site", seed=0, num_questions=150)
small = ["stages.pretrain.model.scratch.hidden_size=16", "stages.pretrain.model.scratch.num_heads=2"]
for name in ("pretrain", "sft", "reward", "dpo", "kto", "raft", "ppo", "ppo_no_kl"):
    small += [f"stages.{name}.train.steps=2", f"stages.{name}.train.eval_every=2"]
for name in ("sft", "reward", "dpo", "kto"):
    small += [f"stages.{name}.{key}" for key in ("train.batch_size=4", "data.limit=40", "data.eval_fraction=0.2")]
for name, algorithm in {"ppo": "ppo", "ppo_no_kl": "ppo", "raft": "raft"}.items():
    online = ("rollout_size=4", "max_new_tokens=8", "num_eval_prompts=2")
    small += [f"stages.{name}.{algorithm}.{key}" for key in online]
small += [f"stages.evaluation.{key}" for key in ("num_prompts=4", "max_new_tokens=8", "draws=1")]
sys.argv = ["fairlead", "pipeline", "demo", f"data.path={folder / 'site'}", "name=small", f"directory={folder}", *small]
main()
"""


def _run(code: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(f"LOG = {str(folder / 'calls')!r}\n{FORBID}")
    paths = [str(folder / "hook"), *sys.path]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_watch_sees_a_call_and_stops_it(tmp_path: Path) -> None:
    done = _run("import urllib.request as r; r.urlopen('http://127.0.0.1:9')", tmp_path)
    assert done.returncode != 0 and "forbidden" in done.stderr
    assert (tmp_path / "calls").read_text().startswith("socket.")


def test_the_demonstration_calls_nobody(tmp_path: Path) -> None:
    done = _run(DEMO, tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "small" / "report.html").is_file()
    assert not (tmp_path / "calls").exists(), (tmp_path / "calls").read_text()
