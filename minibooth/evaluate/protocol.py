"""python -m minibooth.evaluate dataset: the paper's protocol, and its Tables 1, 3 and 4.

For each way of training that a table wants, and each subject: train, draw its prompts, score. What
is there is not done again: a model that was trained, a picture that was drawn, a subject that was
scored. So a run that was stopped goes on with the same command, and one of few subjects or pictures
with more of them. Several processes can work in one folder, each on its --shard of the trainings or
on all that are left: who begins one locks its folder, and a crash unlocks it.
"""

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from .. import toybox
from ..common import cli, files
from ..common.cli import option
from ..common.errors import UserError
from ..common.files import read_text, write_json, write_text
from ..common.pictures import read_image
from ..formats import families, hub
from ..train import train
from ..training import methods, photos, report, resume
from ..training.settings import METHODS, TrainConfig
from ..training.snapshots import is_model
from . import drawing, judges, tables
from .drawing import Job
from .metrics import AVERAGINGS, METRICS, Mean, average, real_rows, score
from .options import Options
from .subjects import FILE, Subject, dataset_folder, fill, find, read_catalogue, wrong_noun


@dataclass(frozen=True)
class DatasetConfig(Options):
    data: str | None = option(
        None,
        "a checkout of google/dreambooth, or a folder laid out like it",
        place="path",
        topic="what is evaluated",
    )
    model: str | None = option(
        None,
        "base model: folder, single file, hub id or toybox [only the row of the real photographs]",
        place="source",
    )
    train_config: str | None = option(
        None,
        "JSON with settings of minibooth.train, say the config.json of a run; what belongs to a "
        "subject is replaced, and rates and steps hold for its own method [the defaults, or the "
        "toybox's]",
        place="path",
    )
    subjects: str | None = option(None, "names with commas between [all whose folders are there]")
    prompts: int | None = option(None, "only so many of each subject's prompts [all]")
    tables: str = option("1,3,4", "of the paper, with commas between")
    methods: str = option(
        "dreambooth",
        "of training, for Table 1, with commas between: also lora, textual_inversion, hypernetwork",
    )
    averaging: str = option(
        "subjects",
        "over subjects, each counting the same; or over pairs, so that more photographs weigh more",
        choices=AVERAGINGS,
    )
    keep_models: bool = option(
        False, "keep every trained model (4.3 GB for SD 1.5); else its pictures are enough"
    )
    shard: str | None = option(
        None,
        "3/8 trains the 3rd, 11th, 19th … only; others can do the rest at the same time, in the "
        "same output_dir [all that nobody else is at]",
    )
    output_dir: str = option("evaluation", "where everything goes", place="path")

    def check(self) -> None:
        super().check()
        if self.data is None:
            raise UserError(f"give --data: a checkout of google/dreambooth, which holds {FILE}")
        cli.check_at_least_one(self, ["prompts"])
        _ = self.share
        if wrong := [n for n in self.table_numbers if n not in TABLES]:
            raise UserError(f"--tables {wrong[0]!r}: give some of {', '.join(TABLES)}")
        if wrong := [n for n in self.trained_by if n not in METHODS]:
            raise UserError(f"--methods {wrong[0]!r}: give some of {', '.join(METHODS)}")

    @property
    def share(self) -> tuple[int, int]:
        """--shard 3/8 as (3, 8). Raises UserError for what is none."""
        number, _, of = (self.shard or "1/1").partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise UserError(f"--shard {self.shard!r}: give one of 1/8, 2/8, …, 8/8")
        return int(number), int(of)

    @property
    def table_numbers(self) -> list[str]:
        return [number.strip() for number in self.tables.split(",")]

    @property
    def trained_by(self) -> list[str]:
        return [method.strip() for method in self.methods.split(",")]

    @property
    def arms(self) -> list["Arm"]:
        """All ways of training that the tables want."""
        wanted = [arm for number in self.table_numbers for arm in TABLES[number]]
        wanted += [BY_METHOD[m] for m in self.trained_by if "1" in self.table_numbers]
        return list(dict.fromkeys(wanted))


@dataclass(frozen=True)
class Arm:
    """A way of training that tables compare."""

    name: str  # its folder
    prior: bool  # with prior preservation
    noun: str = "correct"  # the class noun in the prompts: "correct", "none" or "wrong"
    method: str = "dreambooth"


WITH_PRIOR, WITHOUT_PRIOR = Arm("with_prior", True), Arm("without_prior", False)
# Without prior preservation, as what they are compared with: where there is no noun, there is no
# class to preserve. The paper does not say how its Table 4 was trained.
NO_NOUN, WRONG_NOUN = Arm("no_noun", False, "none"), Arm("wrong_noun", False, "wrong")
BY_METHOD = {
    "dreambooth": WITH_PRIOR,
    "lora": Arm("lora", True, method="lora"),
    "hypernetwork": Arm("hypernetwork", True, method="hypernetwork"),
    # The word stands alone in its prompts, as in that paper: what class it is of, it has learned.
    "textual_inversion": Arm("textual_inversion", False, "none", "textual_inversion"),
}
TABLES = {
    "1": (),  # what --methods says
    "3": (WITH_PRIOR, WITHOUT_PRIOR),
    "4": (WITHOUT_PRIOR, NO_NOUN, WRONG_NOUN),
}


def evaluate(config: DatasetConfig) -> str:
    """Run what is left of the protocol, write and print the tables. Raises UserError."""
    config.check()
    cli.check_folder("--output_dir", config.output_dir)
    found, absent = find(config.data, config.subjects)
    if absent:
        print(f"{len(absent)} subjects of {FILE} have no folder here: {', '.join(absent)}")
    protocol = Protocol(config, found)
    protocol.run()
    protocol.collect()
    text = protocol.make_tables()
    write_text(protocol.out / "tables.md", text + "\n")
    grids = ", a grid.png for every subject" if protocol.arms else ""
    print(f"\n{text}\n\n{protocol.out}: tables.md, subjects.csv{grids}")
    return text


class Protocol:
    """One run of it: its subjects, judge, settings and folder."""

    def __init__(self, config: DatasetConfig, found: list[Subject]):
        self.config, self.subjects, self.out = config, found, Path(config.output_dir)
        self.nouns = read_catalogue(dataset_folder(config.data) / FILE).nouns
        self.arms = config.arms if config.model else []
        by = dict.fromkeys(["dreambooth", *(arm.method for arm in self.arms)])
        self.training = {m: training_settings(config, m) for m in by if config.model}
        self.judge = judges.load(config)
        self.results: dict[tuple[str, str], dict[str, Mean]] = {}  # by row and subject

    def run(self) -> None:
        config = self.config
        resume.remove_leftovers(self.out, older=3600)
        if config.model:
            names = ("model", "identifier", "steps", "guidance_scale", "seed")
            settings = {name: getattr(config, name) for name in names}
            training = {
                f"{'training' if method == 'dreambooth' else method}'s {name}": value
                for method, of_it in self.training.items()
                for name, value in of_it.items()
            }
            resume.remember(self.out, settings | training)
        for subject in tqdm(self.subjects, desc="real photographs", unit="subject"):
            rows = real_rows(self.judge, self.photographs(subject), config.self_pair_choices)
            for self_pairs, scores in rows.items():
                self.results[tables.real_name(self_pairs), subject.name] = scores
        self.collect()
        number, of = config.share
        todo = [job for job in self.trainings[number - 1 :: of] if not self.known(*job)]
        with tqdm(total=len(todo), desc="protocol", unit="subject", disable=not todo) as bar:
            for arm, subject in todo:
                self.attempt(arm, subject)
                bar.update()

    @property
    def trainings(self) -> list[tuple[Arm, Subject]]:
        return [(arm, subject) for arm in self.arms for subject in self.subjects]

    def known(self, arm: Arm, subject: Subject) -> bool:
        return (arm.name, subject.name) in self.results

    def attempt(self, arm: Arm, subject: Subject) -> None:
        """Train and score, unless another process is at it or has done it."""
        what = f"{subject.name} ({subject.noun}), {arm.name}:"
        with files.claimed(self.folder(arm, subject)) as ours:
            self.collect()
            if not ours:
                tqdm.write(f"{what} another process is at it")
            elif not self.known(arm, subject):
                tqdm.write(what)
                self.results[arm.name, subject.name] = self.evaluate(arm, subject)
                self.write_csv()

    def collect(self) -> None:
        """Take over the scores that are there, whoever found them."""
        for arm, subject in self.trainings:
            scores = None if self.known(arm, subject) else self.scored(arm, subject)
            if scores is not None:
                self.results[arm.name, subject.name] = scores
        self.write_csv()

    # -- one subject, trained in one way

    def folder(self, arm: Arm, subject: Subject) -> Path:
        return self.out / arm.name / subject.name

    def noun(self, arm: Arm, subject: Subject) -> str:
        """The class noun that its prompts have."""
        wrong = wrong_noun(subject, self.nouns) if arm.noun == "wrong" else ""
        return {"correct": subject.noun, "none": "", "wrong": wrong}[arm.noun]

    def identifier(self, arm: Arm) -> str:
        """The subject's word in its prompts."""
        new = arm.method == "textual_inversion"
        return f"<{self.config.identifier}>" if new else self.config.identifier

    def jobs(self, arm: Arm, subject: Subject) -> tuple[list[Job], list[Job]]:
        """The pictures to draw for the subject, and for its bare class."""
        config, folder, noun = self.config, self.folder(arm, subject), self.noun(arm, subject)
        prompts = {}
        for template in subject.prompts[: config.prompts]:
            prompt = fill(template, self.identifier(arm), noun)
            # What should be seen is the true class, whatever noun the prompt has.
            text = prompt if config.identifier_in_text else fill(template, "", subject.noun)
            prompts[prompt] = text
        bare = {subject.class_prompt: None}
        return (
            drawing.jobs(folder / "pictures", prompts, config.images, config.seed),
            drawing.jobs(folder / "class", bare, config.class_images, config.seed),
        )

    def evaluate(self, arm: Arm, subject: Subject) -> dict[str, Mean]:
        config, folder = self.config, self.folder(arm, subject)
        (wanted, bare), model = self.jobs(arm, subject), folder / "model"
        resume.remove_leftovers(folder)
        if drawing.missing(wanted + bare):
            if not is_model(model):
                with redirect_stdout(io.StringIO()):  # it tells of a model that will not stay
                    train(self.train_config(arm, subject))
            sd = drawing.load_model(model, config, self.training[arm.method]["model"])
            drawing.draw(sd, wanted + bare, config, f"drawing {subject.name}")
        if not config.keep_models:
            remove(model)
        pictures, real = drawing.pictures(wanted), self.photographs(subject)
        of_class = [p.image for p in drawing.pictures(bare)]
        scores = score(self.judge, real, pictures, of_class)
        rows = {}
        for p in pictures:
            rows.setdefault(p.prompt, []).append(p.image)
        title = f"{subject.name}, {arm.name}"
        report.save_image(drawing.grid(real, rows, title), folder / "grid.png")
        found = {metric: asdict(mean) for metric, mean in scores.items()}
        write_json(folder / "scores.json", {"asked": self.asked(arm, subject), "scores": found})
        return scores

    def photographs(self, subject: Subject) -> list:
        return [read_image(file) for file in photos.image_files(subject.folder)]

    def asked(self, arm: Arm, subject: Subject) -> dict:
        """What scores depend on: with the same, they are not measured again."""
        wanted, bare = self.jobs(arm, subject)
        return {
            "judge": self.judge.about,
            "texts": list(dict.fromkeys(job.text for job in wanted)),
            "pictures": [job.file.name for job in wanted + bare],
            "photographs": [file.name for file in photos.image_files(subject.folder)],
        }

    def scored(self, arm: Arm, subject: Subject) -> dict[str, Mean] | None:
        """The scores that are there already, if they are those that are asked for."""
        path = self.folder(arm, subject) / "scores.json"
        if not path.exists():
            return None
        try:
            kept = json.loads(read_text(path))
            same = kept["asked"] == self.asked(arm, subject)
            scores = {metric: Mean(**mean) for metric, mean in kept["scores"].items()}
        except (ValueError, KeyError, TypeError):  # not what was written: measure again
            return None
        return scores if same else None

    def train_config(self, arm: Arm, subject: Subject) -> TrainConfig:
        noun, settings, name = self.noun(arm, subject), self.training[arm.method], {}
        if arm.method == "textual_inversion":
            name["placeholder_token"] = self.identifier(arm)
            name["initializer_token"] = subject.noun.split()[-1]
        return TrainConfig(
            **settings
            | name
            | {
                "instance_data_dir": str(subject.folder),
                "instance_prompt": fill("a {0} {1}", self.identifier(arm), noun),
                "class_prompt": subject.class_prompt if arm.noun == "correct" else None,
                "prior_loss_weight": settings["prior_loss_weight"] if arm.prior else 0.0,
                "output_dir": str(self.folder(arm, subject) / "model"),
                # Of the frozen model: the same for all subjects of a class.
                "class_data_dir": str(self.out / "class_images"),
                "resume_from_checkpoint": "latest",
            }
        )

    # -- what comes out

    def write_csv(self) -> None:
        """What is known so far, a line for every row of the tables and subject."""
        nouns = {tables.real_name(k): lambda s: "" for k in self.config.self_pair_choices}
        nouns |= {arm.name: partial(self.noun, arm) for arm in self.arms}
        rows = [
            (row, s.name, s.noun, noun(s), *tables.values(self.results[row, s.name]))
            for row, noun in nouns.items()
            for s in self.subjects
            if (row, s.name) in self.results
        ]
        columns = ("row", "subject", "class", "noun in prompts", *METRICS)
        tables.write_csv(self.out / "subjects.csv", columns, rows)

    def mean(self, row: str) -> dict[str, float]:
        """A row's metrics, averaged over the subjects."""
        of_row = [scores for (name, _), scores in self.results.items() if name == row]
        return average(of_row, self.config.averaging)

    def make_tables(self) -> str:
        config, total = self.config, len(self.nouns)
        prompts = max(len(s.prompts[: config.prompts]) for s in self.subjects)
        size = f"{len(self.subjects)} of {total} subjects"
        if self.arms:
            size += f", {prompts} prompts, {config.images} pictures of each"
        mean = {arm.name: self.mean(arm.name) for arm in self.arms}
        real = {k: self.mean(tables.real_name(k)) for k in config.self_pair_choices}
        ours = {m: mean[BY_METHOD[m].name] for m in METHODS if BY_METHOD[m].name in mean}
        parts = [f"## Table 1: fidelity ({size})", tables.table_1(real, ours)]
        if self.arms and "3" in config.table_numbers:
            parts.append("## Table 3: prior preservation (its second term doubles the batch)")
            parts.append(tables.table_3(mean["with_prior"], mean["without_prior"]))
        if self.arms and "4" in config.table_numbers:
            parts.append("## Table 4: class noun (all trained without prior preservation)")
            arms = {"correct": "without_prior", "none": "no_noun", "wrong": "wrong_noun"}
            parts.append(tables.table_4({noun: mean[arm] for noun, arm in arms.items()}))
        average = {"subjects": "every subject counts the same", "pairs": "every pair does"}
        lines = tables.stated(config, self.judge)
        lines += [tables.drawn_with(config)] if self.arms else []
        done = [arm.name for arm, subject in self.trainings if self.known(arm, subject)]
        if len(done) < len(self.trainings):
            of_arms = [f"{arm.name} {done.count(arm.name)}" for arm in self.arms]
            lines.append(
                f"{len(done)} of {len(self.trainings)} trainings are finished; a row is the mean "
                f"over the subjects it has: {', '.join(of_arms)}"
            )
        lines.append(f"averaged so that {average[config.averaging]} (--averaging)")
        parts.append("\n".join(f"- {line}" for line in lines))
        return "\n\n".join(parts)


def training_settings(config: DatasetConfig, method: str) -> dict:
    """Settings of TrainConfig that all subjects share. Raises UserError for what cannot work."""
    of_model, suited = {"model": config.model}, methods.defaults({"method": method})
    usual = families.train_settings(of_model)
    its_own = families.train_settings(of_model | {"method": method})
    if config.model == "toybox":
        usual = toybox.default_run()
        its_own = toybox.train_settings(of_model | {"method": method})
    suited = suited | {name: x for name, x in its_own.items() if x != usual.get(name)}
    of_file = {}
    if config.train_config:
        of_file = cli.read_config(Path(config.train_config), TrainConfig)
    theirs = of_file.get("method", "dreambooth")
    if theirs != method:  # the file's rates and steps are for what it trains
        own = suited.keys() | methods.defaults({"method": theirs}).keys()
        of_file = {name: x for name, x in of_file.items() if name not in own}
    given = usual | suited | of_file | {"method": method}
    # By its folder: train() scores a run on "toybox" by itself, which is done better here.
    model = str(hub.toybox()) if config.model == "toybox" else config.model
    shared = TrainConfig(**given | {"model": model, "device": config.device})
    settings = asdict(shared) | {
        "num_validation_images": 0,
        "validation_prompt": (),
        "checkpoints_total_limit": 1,
        "concepts_list": None,
        "caption_extension": None,
        "caption_column": None,
        "config": None,
    }
    if method == "dreambooth" and not shared.uses_prior:
        raise UserError(f"{config.train_config}: prior_loss_weight must be above 0 for Tables 1, 3")
    names = ("instance_data_dir", "instance_prompt", "class_prompt")
    names += ("placeholder_token", "initializer_token")
    placeholders = dict.fromkeys(names, ".")
    TrainConfig(**settings | placeholders).check()
    return settings


def remove(folder: Path) -> None:
    """Under another name first: a model that is half removed must not look like a whole one."""
    gone = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone)
