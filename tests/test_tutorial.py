"""tutorial.md says what the code says: quotes are the source, the other blocks run, numbers hold.

In tutorial.md,

    <!-- minibooth/schedule.py:q_sample -->   before a fence: its lines stand so in that symbol
    ```python                                 without it: is run, all in one session
    ```output                                 behind it: what it printed
    .068<!-- = alpha_bar[999] ** 0.5 -->      a number, worked out in that session

Numbers may be off by one unit of their last digit. "toybox" behind ```output or = is for what
depends on the toybox's weights, which are compared where they are there. Marks that name a file are
those of all pages (tests/pages.py). From part 6 on nothing of the parts before it is there.
"""

import ast
import contextlib
import csv
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import solutions
import torch
from pages import IS_OF_A_FILE, NUMBER, POINTER, ROOT, parsed, source, values

from minibooth import toybox
from minibooth.classify import ClassifyConfig
from minibooth.common import cli
from minibooth.evaluate.snapshots import SnapshotsConfig
from minibooth.formats import hub
from minibooth.formats.checkpoint import NETWORKS
from minibooth.formats.public import SD_SCHEDULER
from minibooth.formats.scheduler import read_schedule
from minibooth.pipeline import StableDiffusion
from minibooth.sample import SampleConfig
from minibooth.tokenizer import BOS, EOS
from minibooth.toybox import pretrain, world
from minibooth.toybox.drift import DriftConfig
from minibooth.train import TrainConfig
from minibooth.training import methods

TEXT = (ROOT / "tutorial.md").read_text("utf-8")
SHIPPED = (ROOT / "weights" / "toybox" / "model_index.json").exists()
FENCE = re.compile(
    rf"(?:^<!-- (?P<quoted>{POINTER}) -->\n)?^```(?P<kind>[\w ]*)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Piece:
    """A fence or a number of the tutorial, in the order of the text."""

    line: int
    kind: str  # "quote", "python", "output", "number" or the fence's language
    code: str
    quoted: str | None = None
    shown: str = ""
    percent: bool = False
    toybox: bool = False


def pieces() -> list[Piece]:
    out, fences = [], list(FENCE.finditer(TEXT))
    for m in fences:
        kind, _, more = (m["kind"] or "").partition(" ")
        kind = "quote" if m["quoted"] else kind
        line = 1 + TEXT.count("\n", 0, m.start("code"))
        out.append(Piece(line, kind, m["code"], quoted=m["quoted"], toybox=more == "toybox"))
    for m in NUMBER.finditer(TEXT):
        assert not any(f.start() < m.start() < f.end() for f in fences)
        if IS_OF_A_FILE.search(m["code"]):
            continue
        line = 1 + TEXT.count("\n", 0, m.start())
        given = {"shown": m["shown"], "percent": bool(m["percent"]), "toybox": bool(m["toybox"])}
        out.append(Piece(line, "number", m["code"], **given))
    return sorted(out, key=lambda piece: piece.line)


PIECES = pieces()
needs_the_toybox = pytest.mark.skipif(
    not SHIPPED, reason="weights/toybox/model_index.json is not there yet"
)


# ---- quotes and pointers -----------------------------------------------------------------------


QUOTES = [p for p in PIECES if p.kind == "quote"]


@pytest.mark.parametrize("piece", QUOTES, ids=lambda p: f"{p.line} {p.quoted}")
def test_a_quote_is_the_source(piece):
    """Whole, or some lines of it in a row."""
    lines, whole = (
        textwrap.dedent(s).strip("\n").split("\n") for s in (piece.code, source(piece.quoted))
    )
    found = [
        textwrap.dedent("\n".join(whole[i : i + len(lines)])).split("\n") == lines
        for i in range(len(whole) - len(lines) + 1)
    ]
    assert any(found), f"tutorial.md line {piece.line} is not what {piece.quoted} says"
    assert f"{piece.code}```\n*From `{piece.quoted}`.*\n" in TEXT


def test_every_pointer_into_the_code_leads_somewhere():
    pointers = set(re.findall(rf"`({POINTER})`", TEXT))
    assert len(pointers) > 30
    for pointer in pointers:
        source(pointer)


@pytest.mark.parametrize("path", ["minibooth/schedule.py", "minibooth/dreambooth.py"])
def test_every_function_of_the_schedule_and_the_loss_is_spoken_of(path):
    for node in parsed(path)[1].body:
        if isinstance(node, ast.FunctionDef):
            assert f"`{path}:{node.name}`" in TEXT, node.name


def test_every_question_of_learners_is_answered_with_a_pointer():
    table = TEXT.split("## 9. Questions", 1)[1].split("\n## ", 1)[0]
    answers = re.findall(r"^\*\*(.+?\?)\*\*(.*?)(?=^\*\*|\Z)", table, re.M | re.S)
    asked = " ".join(question for question, _ in answers)
    for words in (
        *("What is `sks`", "rare tokens found", "class images", "How many", "real photographs"),
        *("Where is the prior loss", "loss not fall", "prior loss flat", "look like my subject"),
        *("photographs back", "steps", "learning rate", "text encoder", "weight decay"),
        *("ε and not x", "guidance", "DINO, CLIP-I and CLIP-T"),
    ):
        assert words in asked, words
    for question, answer in answers:
        assert re.search(rf"`{POINTER}`", answer), question


# ---- what runs ---------------------------------------------------------------------------------


def stand_in(folder: Path) -> Path:
    """A model of the toybox's shape that was never trained, with its pictures."""
    tokenizer = pretrain.train_tokenizer(pretrain.PretrainConfig())
    text = pretrain.TEXT_CONFIG | {"vocab_size": len(tokenizer.vocab)}
    text |= {"bos_token_id": tokenizer.vocab[BOS], "eos_token_id": tokenizer.vocab[EOS]}
    configs = {"unet": pretrain.UNET_CONFIG, "vae": pretrain.VAE_CONFIG, "text_encoder": text}
    torch.manual_seed(0)
    networks = {name: build(configs[name]) for name, build in NETWORKS.items() if name in configs}
    configs["scheduler"] = SD_SCHEDULER
    StableDiffusion(
        tokenizer, schedule=read_schedule(SD_SCHEDULER), configs=configs, **networks
    ).save(folder)
    world.export(folder / "subjects")
    return folder


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Run the tutorial from top to bottom, part 6 anew; what was wrong, by kind of piece."""
    here, wrong, counts = tmp_path_factory.mktemp("tutorial"), [], {}
    space, printed = {"__name__": "tutorial"}, ""
    part_6 = 1 + TEXT.count("\n", 0, TEXT.index("\n## 6. ") + 1)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(here):
        if not SHIPPED:
            folder = stand_in(here / "toybox")
            patch.setattr(hub, "toybox", lambda: folder)
        for p in PIECES:
            if p.toybox and not SHIPPED:
                continue
            where = f"tutorial.md line {p.line}"
            if 0 < part_6 < p.line:
                space, part_6 = {"__name__": "tutorial"}, 0
            counts[p.kind] = counts.get(p.kind, 0) + 1
            if p.kind == "python":
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(compile(p.code, where, "exec"), space)
                printed = out.getvalue()
            elif p.kind == "output" and not same_text(p.code, printed):
                wrong.append(f"{where} shows\n{p.code}but it prints\n{printed}")
            elif p.kind == "number":
                value = float(eval(p.code, space))
                if not same_number(p.shown, value * (100 if p.percent else 1)):
                    wrong.append(f"{where} says {p.shown}, but {p.code} is {value:.6g}")
    return counts, wrong


def same_number(shown: str, value: float) -> bool:
    """Whether they agree to one unit of the last digit that is shown."""
    shown = shown.replace("−", "-").replace(",", "")
    digits, _, power = shown.partition("e")
    unit = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    return abs(float(shown) - value) <= 1.0001 * unit if "." in shown else float(shown) == value


def same_text(shown: str, printed: str) -> bool:
    """The same words; numbers with a point to one unit of their last digit."""
    number = r"(?<![\w.])[−-]?\d*\.\d+(?:e[−-]?\d+)?"
    if re.sub(number, "#", shown).split() != re.sub(number, "#", printed).split():
        return False
    pairs = zip(re.findall(number, shown), re.findall(number, printed), strict=True)
    return all(same_number(a, float(b)) for a, b in pairs)


def test_the_tutorial_runs_and_its_numbers_hold(session):
    counts, wrong = session
    assert not wrong, "\n".join(wrong)
    assert counts["python"] > 15 and counts["number"] > 15 and counts["output"] > 5


@needs_the_toybox
def test_the_numbers_of_the_toybox_s_weights_hold(session):
    assert not session[1]


def test_numbers_and_texts_are_compared_to_their_last_digit():
    assert same_number(".068", 0.0683) and not same_number(".068", 0.0701)
    assert same_number("−1.5e-3", -0.00149) and not same_number("1,000", 1001)
    assert same_text("a 1.00 b\n", "a   1.004 b") and not same_text("a 1.00", "a 1.02")
    assert not same_text("[1, 2]", "[1, 3]")


COMMANDS = {
    "minibooth.train": TrainConfig,
    "minibooth.evaluate": SnapshotsConfig,  # all that is in the text is its command snapshots
    "minibooth.explain": TrainConfig,
    "minibooth.sample": SampleConfig,
    "minibooth.classify": ClassifyConfig,
    "minibooth.toybox.drift": DriftConfig,
}


def test_commands_in_the_text_are_commands():
    found = re.findall(r"^python -m (\S+)(.*(?:\\\n.*)*)$", TEXT, re.M)
    assert {name for name, _ in found} >= {"minibooth.train", "minibooth.explain"}
    for name, arguments in found:
        flags = re.findall(r"--([\w-]+)", arguments)
        fields = COMMANDS[name].__dataclass_fields__
        assert {f.replace("-", "_") for f in flags} <= set(fields), (name, flags)
    for path in re.findall(r"^python (\S+\.py)", TEXT, re.M):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["dog", "dog_lora", "face"])
def test_the_recipes_are_settings_that_can_work(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["--config", f"docs/recipes/{name}.json"]
    config = cli.parse(TrainConfig, "x", "", argv, toybox.train_settings)
    config.check()
    assert config.instance_data_dir == "photos" and config.output_dir.startswith("my-")
    assert f"docs/recipes/{name}.json" in (ROOT / "docs" / "guide.md").read_text("utf-8")
    usual = vars(TrainConfig()) | methods.defaults({"method": config.method})
    assert name == "face" or config.learning_rate == usual["learning_rate"]
    assert config.text_encoder_learning_rate == usual["text_encoder_learning_rate"]


@pytest.mark.slow
@needs_the_toybox
def test_the_commands_run_as_written(tmp_path):
    """All but the drift experiment, which takes long and has tests of its own."""
    for folder in ("exercises", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    shell = [p.code for p in PIECES if p.kind == ""]
    commands = [line for code in shell for line in code.splitlines() if "drift" not in line]
    for command in commands:
        argv = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


# ---- numbers that were measured ----------------------------------------------------------------


def test_all_weights_are_above_a_word_on_every_seed():
    """The order of the paper's Table 1."""
    for seed in range(3):
        of_all, of_word = (
            values("docs/methods.csv", "fidelity", trained=name, seed=seed)
            for name in ("all weights", "Textual Inversion")
        )
        assert of_all[0] - of_word[0] > 0.05


def by_eye() -> dict[str, tuple[int, int]]:
    """What weights/toybox/README.md says of the 100 labelled pictures: field → (same, of)."""
    text = " ".join((ROOT / "weights" / "toybox" / "README.md").read_text("utf-8").split())
    form = (
        r"of the class in (\d+) of (\d+), of the place in (\d+) of (\d+), "
        r"and of the colour in (\d+) of the (\d+)"
    )
    n = [int(x) for x in re.search(form, text).groups()]
    return {"class": (n[0], n[1]), "place": (n[2], n[3]), "colour": (n[4], n[5])}


@needs_the_toybox
def test_so_many_pictures_were_labelled_by_eye_as_is_said():
    file = ROOT / "weights" / "toybox" / "judge" / "by_eye.csv"
    rows = list(csv.DictReader(file.read_text("utf-8").splitlines()))
    for field, (_, of) in by_eye().items():
        assert sum(row[field] != "?" for row in rows) == of
    colours = by_eye()["colour"]
    text = " ".join((ROOT / "docs" / "toybox.md").read_text("utf-8").split())
    assert f"the colour in {colours[0]} of the {colours[1]}" in text


@pytest.mark.slow
@needs_the_toybox
def test_the_judge_reads_them_as_is_said(tmp_path):
    argv = [sys.executable, str(ROOT / "docs" / "by_eye.py")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    for field, (same, of) in by_eye().items():
        assert f"{field}: the same in {same} of {of}" in done.stdout


# ---- the forty lines ---------------------------------------------------------------------------


def test_the_complete_dreambooth_has_about_forty_lines():
    [block] = [p.code for p in PIECES if p.kind == "python" and "def finetune" in p.code]
    code = [
        line for line in block.splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert 30 <= len(code) <= 45


# ---- exercises ---------------------------------------------------------------------------------


def exercise(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "exercises" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


verdicts = exercise("check").results
PARTS = sorted(f.stem for f in (ROOT / "exercises").glob("*.py") if f.stem != "check")


@pytest.mark.parametrize("name", PARTS)
def test_exercises_start_unsolved_and_are_named_in_the_tutorial(name):
    module = exercise(name)
    assert set(verdicts(module).values()) == {"not yet"}
    assert f"python exercises/check.py {name}\n" in TEXT
    for function in verdicts(module):
        if function != "claims":
            assert f"`exercises/{name}.py:{function}`" in TEXT


@pytest.mark.parametrize("name", solutions.SOLUTIONS)
def test_the_checks_take_the_solutions_and_notice_mistakes(name):
    module = exercise(name)
    for solution in solutions.SOLUTIONS[name]:
        setattr(module, solution.__name__, solution)
    assert set(verdicts(module).values()) == {"right"}
    for solution in solutions.SOLUTIONS[name]:
        setattr(module, solution.__name__, solutions.MISTAKES[solution.__name__])
    assert all(v.startswith("wrong: ") and len(v) > 15 for v in verdicts(module).values())


def test_a_solution_that_raises_is_told_where():
    module = exercise("noise")
    module.crossing = lambda alpha_bar: None
    assert re.match(r"wrong: \w+Error in line \d+: ", verdicts(module)["crossing"])
    assert verdicts(module)["one_step"] == "not yet"


def test_every_exercise_has_a_solution_here():
    assert {*solutions.SOLUTIONS, "paper"} == set(PARTS)
    stubs = {n for part in PARTS for n in verdicts(exercise(part))} - {"claims"}
    assert stubs == {f.__name__ for fs in solutions.SOLUTIONS.values() for f in fs}


def test_the_claims_about_the_paper_are_judged_as_the_paper_does():
    module = exercise("paper")
    module.CLAIMS.update(zip(module.CLAIMS, solutions.CLAIMS, strict=True))
    assert verdicts(module) == {"claims": "right"}
    for claim, answer in list(module.CLAIMS.items()):
        module.CLAIMS[claim] = not answer
        assert verdicts(module)["claims"] == f"wrong: look again at: {claim}"
        module.CLAIMS[claim] = answer


def test_the_check_program_reports(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check.py", "noise"])
    monkeypatch.syspath_prepend(str(ROOT / "exercises"))
    path = str(ROOT / "exercises" / "check.py")
    exec(compile(Path(path).read_text(), path, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == "crossing: not yet\none_step: not yet\n"
