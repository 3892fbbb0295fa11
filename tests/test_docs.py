"""The documentation: every code block runs, commands print what is shown, the reference follows the schema."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from torch import nn

import ssprop_fx
from ssprop_fx import Policy

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SLOW = ("docs/tutorial.md", "README.md")
SHELL = ("pip ", "python ", "ssprop-fx ", ". ", "make ", "git ", "#")  # what an unlabelled block may hold: shown, not run here
FENCE = re.compile(r"(?:^<!-- (?P<note>\w+) -->\n)?^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass
class Block:
    """A fenced block: its language, the file that it stands for, a note about it, and its line in the page."""

    language: str
    file: str | None
    note: str | None
    text: str
    line: int


@dataclass
class Page:
    name: str
    blocks: list[Block] = field(default_factory=list)


def page(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = Page(name)
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        file = re.search(r'title="([^"]+)"', rest)
        line = text.count("\n", 0, match.start("text")) + 1
        found.blocks.append(Block(language, file and file[1], match["note"], match["text"], line))
    return found


def surroundings():
    """What fragments take for granted: a model, data, and the objects of a training loop."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 8, 8))
    return {
        "torch": torch,
        "nn": nn,
        "ssprop_fx": ssprop_fx,
        "model": model,
        "policy": Policy(schedule={"kind": "bar", "period": 2}),
        "loader": torch.utils.data.DataLoader([(torch.randn(3, 8, 8), label % 2) for label in range(4)], batch_size=2),
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "path": "checkpoint.pt",
        "__name__": "__main__",
    }


def commands(block):
    """(command, lines that it printed) of a console block."""
    found = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line.rstrip())
    return found


def check_output(shown, printed, times, where):
    """Every shown line is printed, in its order; `...` stands for any; numbers may differ where times are printed."""

    def plain(line):
        line = " ".join(line.split())
        if times:
            line = re.sub(r"[+-]?[\d.]+(e[+-]?\d+)?", "0", line).replace(" more", " less").replace(" 0 rules", " 0 rule")
            line = re.sub(r"([━─-])\1+", r"\1", line)
        return line

    lines = iter([plain(line) for line in printed.splitlines()])
    for line in shown:
        if line != "...":
            assert plain(line) in lines, f"{where}: is not printed (here): {line}\n{printed}"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PAGES])
def test_blocks_run(name, tmp_path, monkeypatch, capfd):
    torch._dynamo.reset()
    blocks = page(name).blocks
    if not any("-o policy.yaml" in block.text for block in blocks if block.language == "console"):
        (tmp_path / "policy.yaml").write_text("version: 1\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    of_a_cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # as what is shown
    environment = os.environ | of_a_cpu | {"COLUMNS": "80"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    space = surroundings()
    for block in blocks:
        where = f"{name}:{block.line}"
        if block.file:
            (tmp_path / block.file).write_text(block.text)
        elif block.language == "python":
            code = compile(block.text, where, "exec")
            exec(code, space)
        elif block.language == "yaml":
            text = block.text if "version" in block.text else f"version: 1\n{block.text}"
            (tmp_path / "block.yaml").write_text(text)
            assert Policy.load(tmp_path / "block.yaml")
        elif block.language == "console":
            for command, shown in commands(block):
                if block.note == "demo":  # of twenty epochs one is enough to see that it runs and prints this
                    command += " --epochs 1"
                done = subprocess.run(
                    command, shell=True, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900
                )
                assert (done.returncode != 0) == (block.note == "fails"), f"{where}: {command}\n{done.stderr}"
                check_output(shown, done.stdout + done.stderr, block.note in ("times", "demo"), where)
        elif block.language == "":
            for line in block.text.splitlines():
                assert not line.strip() or line.startswith(SHELL), f"{where}: {line}"
        else:
            assert block.language == "text", f"{where}: what is a block of {block.language}?"


def test_commands_of_the_readme_run_from_top_to_bottom():
    """Each policy file was written by a command further up, and none is written over."""
    (block,) = (b for b in page("README.md").blocks if b.language == "" and "ssprop-fx demo" in b.text and "bench" in b.text)
    written = []
    for line in block.text.splitlines():
        words = line.partition("#")[0].split()
        files = {words[i]: words[i + 1] for i in range(len(words)) if words[i] in ("-p", "-o")}
        read = [files["-p"]] if "-p" in files else [words[-1]] if words[1:3] == ["policy", "check"] else []
        assert set(read) <= set(written), line
        assert files.get("-o") not in written, line
        written += [files["-o"]] if "-o" in files else []
    assert written == ["policy.yaml", "tuned.yaml"]


def test_the_reference_of_keys_follows_the_schema(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import policy_keys

    assert policy_keys.PAGE.read_text(encoding="utf-8") == policy_keys.page(), "run python docs/policy_keys.py"


def test_pictures_and_pages_that_are_referred_to_exist():
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)|src=\"([^\"]+)\"", text):
            target = target[0] or target[1]
            if not target.startswith("http"):
                assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"


def test_pages_of_the_site_refer_to_files_that_are_published():
    """Links out of `docs` and to what is left out are dead there; so are paths in raw HTML, which nobody rewrites."""
    for name in PAGES[1:]:
        text = re.sub(FENCE, "", (ROOT / name).read_text(encoding="utf-8"))
        assert not re.search(r"<(img|a) ", text), name
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith("http"):
                file = (ROOT / name).parent.joinpath(target).resolve()
                assert file.is_relative_to(ROOT / "docs"), f"{name}: {target}"
                assert file.is_file(), f"{name}: {target}"
                assert file.suffix in (".md", ".png"), f"{name}: {target}"


def dead_links(site):
    """(page, target) of every reference inside of the site that leads nowhere."""
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8")):
            path, _, anchor = unquote(target).partition("#")
            if page.name == "404.html" or re.match(r"[a-z]+:|//", target):
                continue
            file = page.parent / path if path else page
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (anchor and f'id="{anchor}"' not in file.read_text(encoding="utf-8")):
                yield str(page.relative_to(site)), target


def test_every_page_is_in_the_site():
    import yaml

    def names(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [name for value in values for name in names(value)]

    listed = names(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(f"docs/{name}" for name in listed) == sorted(set(PAGES) - {"README.md"})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkdocs", path=Path(sys.executable).parent) is None, reason="needs the extra docs")
def test_the_site_builds(tmp_path):
    command = [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert list(dead_links(tmp_path)) == []
    assert (tmp_path / "results" / "ddpm" / "dense.png").exists()
    assert not list((tmp_path / "results").rglob("*.json"))
    api = (tmp_path / "api" / "index.html").read_text()
    for name in ssprop_fx.__all__:
        assert f'id="ssprop_fx.{name}"' in api, name
