"""README and docs name all there is, and what is; files that people share hold nothing of one machine."""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from PIL import Image

from backend import cli
from backend.attach import OLDEST
from backend.connection import FLAGS, TAB, keeper_address
from backend.embedded import studio_environment
from backend.label_config import COARSE_NAMES, DISTINCT, MASK_TAGS, MIXED_LABEL, parse
from backend.labelstudio import LabelStudio
from backend.rank import MOST, UNDECIDED
from backend.settings import OTHERS, Settings
from model.data import Folder
from model.field import render
from model.network import NETWORKS
from model.results import read
from model.strategies import STRATEGIES
from model.summary import summarise

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[0].split()
REQUIREMENT = re.compile(r"[a-z0-9][a-z0-9.\-]*==[\w.+!]+( ; [^\\]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?")


def rows(first: str, page: str = "README.md") -> dict[str, list[str]]:
    """The rows of a page's table whose first column is so called, by each name in their first cell."""
    lines = iter(PAGES[page].splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    found: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[1:])
    return found


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of the firstrow command, by name."""
    actions = cli._parser()._actions
    return next(dict(action.choices) for action in actions if isinstance(action, argparse._SubParsersAction))


def committed() -> list[Path]:
    """Every file that is committed."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_setting_is_named_with_its_default() -> None:
    table = rows("variable", "settings.md")
    assert table.keys() == {field.alias for field in Settings.model_fields.values()}
    for field in Settings.model_fields.values():
        cell, default = table[str(field.alias)][0], field.get_default()
        if isinstance(default, str | int | float | Path) and default != "":
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert f"`{shown}`" in cell, field.alias
        else:
            assert "`" not in cell, field.alias


def test_variables_in_the_pages_exist() -> None:
    pages = " ".join(PAGES.values())
    named = set(re.findall(r"\b(?:FIRSTROW|LABEL_STUDIO)_[A-Z_]*[A-Z]", pages))
    asked = set(re.findall(r"\$\{(\w+)", (ROOT / "docker" / "compose.yaml").read_text()))
    assert named <= {field.alias for field in Settings.model_fields.values()} | OTHERS | asked


def test_every_command_is_in_the_readme() -> None:
    names = {name.removeprefix("firstrow ") for name in rows("command")}
    assert names == subcommands().keys()


def test_commands_in_the_pages_are_understood() -> None:
    for page, least in (("README.md", 4), ("setup.md", 3), ("strategies.md", 3)):
        examples = re.findall(r"^\s*(?:\.venv/bin/|.* exec serve )firstrow (.*?)(?: &)?$", PAGES[page], re.M)
        assert len(examples) >= least, page
        for example in examples:
            cli._parser().parse_args(example.split())


def test_what_is_typed_after_activation_is_there() -> None:
    scripts = Path(sys.executable).parent
    assert all((scripts / name).is_file() for name in ("activate", "firstrow", "python", "pytest"))


def test_the_readme_tells_what_a_project_needs_and_what_attach_changes() -> None:
    assert f"Label Studio {'.'.join(map(str, OLDEST))} or later" in README
    assert all(tag in README for tag in MASK_TAGS)
    [change] = [line for line in README.splitlines() if line.startswith("| attach |")]
    for part in (*FLAGS.values(), *list(FLAGS)[1:], keeper_address(7), TAB, COARSE_NAMES[0]):
        assert isinstance(part, bool) or str(part) in change, part
    assert f"*Soil{DISTINCT}*" in README
    parsed = parse(
        '<View><Image name="i" value="$i"/><BrushLabels name="b" toName="i"><Label value="Crop"/></BrushLabels></View>'
    )
    assert all(f"*{name}*" in README for name in (*parsed.classes.coarse, MIXED_LABEL))


def test_the_readme_tells_how_many_coarse_labels_are_asked_for() -> None:
    default = Settings.model_fields["coarse_tasks"].default
    assert default == 5
    assert "asks for five, less those" in " ".join(README.split())
    assert f"more than {UNDECIDED:.0%}".replace("%", " %") in " ".join(README.split())
    assert f"{MOST * default} in all at most" in " ".join(README.split())


def test_the_pages_tell_how_label_studio_is_started_in_docker() -> None:
    release = (ROOT / "requirements" / "studio.in").read_text().strip().partition("==")[2]
    assert f"tested: {release}" in README
    setup = PAGES["setup.md"]
    assert f"heartexlabs/label-studio:{release}\n" in setup
    for name, value in studio_environment(ROOT).items():
        if name in ("ML_BLOCK_LOCAL_IP", "SSRF_PROTECTION_ENABLED"):
            assert f"-e {name}={value}" in setup
            assert f"{name}={value}" in README


def test_the_example_of_a_pixel_labelled_folder_is_one(tmp_path: Path) -> None:
    [example] = re.findall(r"```json\n(.*?)```", PAGES["setup.md"], re.S)
    (tmp_path / "dataset.json").write_text(example)
    for kind, name, mode in (("images", "0001.jpg", "RGB"), ("masks", "0001.png", "L")):
        (tmp_path / kind).mkdir()
        Image.new(mode, (8, 6), 2 if mode == "L" else "green").save(tmp_path / kind / name)
    folder = Folder(tmp_path)
    assert folder.classes.coarse == ("background", "vegetation")
    assert (folder.names("train"), folder.names("test")) == (["0001", "0002"], ["0003"])
    assert folder.image("0001", 8).shape[:2] == folder.mask("0001", 8).shape


def test_every_make_target_is_in_the_readme() -> None:
    for target in TARGETS:
        assert f"make {target}" in README, target
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.M))
    assert named <= set(TARGETS)


def test_every_strategy_is_named() -> None:
    assert rows("name", "strategies.md").keys() == set(STRATEGIES)


def test_every_network_is_named() -> None:
    section = PAGES["settings.md"].partition("\n## Networks")[2].partition("Without internet")[0]
    assert set(re.findall(r"`([^`]+)`", section)) == set(NETWORKS)


def test_the_pages_say_how_the_api_key_of_compose_is_chosen() -> None:
    compose = (ROOT / "docker" / "compose.yaml").read_text()
    chosen = "export LABEL_STUDIO_API_KEY=$(openssl rand -hex 20) LABEL_STUDIO_PASSWORD=..."
    assert chosen in PAGES["setup.md"]
    assert chosen in compose


def test_changes_are_noted_before_a_release() -> None:
    _, *sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert sections[0].startswith("[Unreleased]\n")
    assert "\n- " in sections[0]


@pytest.mark.parametrize("arguments", [[], *([name] for name in subcommands())])
def test_help_is_shown(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "backend.cli", *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: firstrow")


def test_make_targets_are_phony_or_files() -> None:
    done = subprocess.run(["make", "-n", *TARGETS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_imported_is_declared() -> None:
    declared = {canonical(name) for name in PYPROJECT["project"]["dependencies"]}
    owners = packages_distributions()
    for path in [*ROOT.glob("backend/*.py"), *ROOT.glob("model/*.py")]:
        for module in imported(ast.parse(path.read_text())) - set(sys.stdlib_module_names) - {"backend", "model"}:
            names = {canonical(name) for name in owners[module]}
            # what comes with a declared package of the same makers
            indirect = {"werkzeug": "flask", "urllib3": "requests", "pydantic-core": "pydantic", "markupsafe": "flask"}
            names |= {indirect[name] for name in names if name in indirect}
            assert names & declared, f"{path.name} imports {module}"


def imported(tree: ast.AST) -> set[str]:
    """Names of the top-level modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def canonical(requirement: str) -> str:
    """The name of a distribution, as indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.\-]", requirement)[0]).lower()


def test_model_knows_nothing_of_backend() -> None:
    for path in ROOT.glob("model/*.py"):
        assert not imported(ast.parse(path.read_text())) & {"backend", "flask", "redis", "rq", "label_studio_sdk"}, path


@pytest.mark.parametrize("name", ["firstrow.txt", "studio.txt"])
def test_locks_are_names_versions_and_hashes(name: str) -> None:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    assert len(lines) > 100
    assert [line for line in lines if not REQUIREMENT.fullmatch(line)] == []


def test_locks_hold_what_is_declared() -> None:
    extra = PYPROJECT["project"]["optional-dependencies"]["dev"]
    lines = (ROOT / "requirements" / "firstrow.txt").read_text().splitlines()
    locked = {canonical(line) for line in lines if not line.startswith(" ")}
    assert {canonical(name) for name in PYPROJECT["project"]["dependencies"] + extra} <= locked
    assert "label-studio" not in locked


def test_no_committed_file_names_an_index() -> None:
    words = [
        "index" + "-url",
        "find" + "-links",
        "trusted" + "-host",
        "pypi" + ".org",
        "python" + "hosted",
        "registry.npm" + "js",
    ]
    for path in committed():
        text = path.read_text(errors="ignore")
        assert not [word for word in words if word in text], path


def test_yaml_files_are_yaml() -> None:
    for path in committed():
        if path.suffix in (".yaml", ".yml"):
            assert yaml.safe_load(path.read_text()), path


def test_ci_runs_what_people_run() -> None:
    script = ROOT / ".ci" / "run"
    assert "\nmake test\n" in script.read_text()
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_the_label_config_is_one_for_the_rendered_field(label_studio: LabelStudio) -> None:
    xml = (ROOT / "label_config.xml").read_text()
    config = parse(xml)
    assert config.classes.fine == ("soil", "crop", "weed")
    assert config.classes.groups == ((0,), (1, 2))
    assert config.coarse is not None
    _, mask = render(0, "target", (160, 120))
    assert mask.max() < len(config.classes.fine)
    hotkeys = re.findall(r'hotkey="(.)"', xml)
    assert len(hotkeys) == len(set(hotkeys)) == 6
    made = label_studio.create_project("the label config of the README", xml)
    assert label_studio.project(made["id"])["label_config"] == xml.strip()


BENCHMARK = ROOT / "docs" / "benchmark"


def test_the_benchmarks_summary_is_that_of_its_rows() -> None:
    facts = summarise(read(BENCHMARK / "results.csv"))
    kept = json.loads((BENCHMARK / "summary.json").read_text())
    assert facts["rows"] == kept["rows"]
    for setting, told in kept["settings"].items():
        for name, one in told["sets"].items():
            found = facts["settings"][setting]["sets"][name]["strategies"]
            assert found.keys() == one["strategies"].keys()
            for strategy, numbers in one["strategies"].items():
                assert found[strategy]["auc"] == pytest.approx(numbers["auc"]), (setting, name, strategy)


def test_the_readme_tells_the_benchmarks_areas() -> None:
    sets = json.loads((BENCHMARK / "summary.json").read_text())["settings"]["pretrained head"]["sets"]
    table = rows("area under mIoU(1..20)")
    assert len(table) >= 5
    for strategy, cells in table.items():
        for name, cell in zip(("peanut", "field-target", "camvid"), cells, strict=True):
            facts = sets[name]["strategies"][strategy]
            low, high = facts["auc_interval"]
            assert cell == f"{facts['auc']:.3f} [{low:.3f}, {high:.3f}]", (strategy, name)
    behind = README.partition("**Behind.**")[2].partition("- **")[0]
    for facts in (sets[name]["strategies"] for name in ("peanut", "field-target", "camvid")):
        ahead = {name for name, one in facts.items() if one["auc"] > facts["first-row"]["auc"]}
        assert [name for name in ahead if f"`{name}`" not in behind] == []


def test_links_in_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), BENCHMARK / "report.md"]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link, _, heading in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", text):
            target = page.parent / link if link else page
            assert link.startswith("http") or target.exists(), f"{page.name}: {link}"
            assert not heading or heading in anchors(target), f"{page.name}: {link}#{heading}"


def anchors(page: Path) -> set[str]:
    """By what the headings of a page are linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
