"""What the tests on the pretend card do there. Each function runs in a process of its own that has
the card, takes and returns what JSON can hold, and imports no peer, which would take seconds."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

import pretend_card
import tiny
import torch
from torch import nn
from triton.runtime import interpreter

from minibooth import UserError, load, lora, ops, toybox, train, unet, vae
from minibooth.bench import first, measure, models, parts
from minibooth.common import cli
from minibooth.common.errors import first_line
from minibooth.device import graphs, memory, ranks
from minibooth.device.precision import Precision
from minibooth.formats.public import SD1_UNET, SD_VAE
from minibooth.toybox import score, world
from minibooth.toybox.pretrain import TEXT_CONFIG
from minibooth.training import fit, optimizer, plan, prepare
from minibooth.training.settings import TrainConfig


@contextlib.contextmanager
def eager():
    """Within it no CUDA graph is recorded."""
    capturable = graphs.capturable
    graphs.capturable = lambda device: False
    try:
        yield
    finally:
        graphs.capturable = capturable


@contextlib.contextmanager
def watched(into: dict):
    """Notes what the card saw in the meantime, and what was printed."""
    said, errors, before = io.StringIO(), io.StringIO(), pretend_card.counts()
    pretend_card.WAITS.clear()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        yield
    after = pretend_card.counts()
    into["captures"], into["replays"] = (b - a for a, b in zip(before, after, strict=True))
    into["waits"] = [[what, where, n] for (what, where), n in pretend_card.WAITS.items()]
    into["said"], into["last error"] = said.getvalue(), errors.getvalue()[-300:]


def content(folder: Path) -> dict[str, str]:
    """A hash of every file that a run has made, but for those that name their folder."""
    named = ("config.json", "README.md")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in named
    }


def run(settings: dict) -> dict:
    """A training run and what it left behind."""
    found, folder = {}, Path(settings["output_dir"])
    with watched(found):
        try:
            train.train(TrainConfig(**settings))
        except UserError as error:
            found["error"] = str(error)
    found["files"] = content(folder)
    csv = folder / "loss.csv"
    found["losses"] = csv.read_text().splitlines()[1:] if csv.exists() else []
    return found


class TableInPyTorch:
    """The kernels of AdamW by operators that PyTorch's path takes, in their order."""

    def __init__(self, weights, averages, copies, groups):
        self.weights, self.averages, self.copies, self.groups = weights, averages, copies, groups

    def norm(self, gradients):
        for gradient, copy in zip(gradients, self.copies, strict=True):
            assert gradient.dtype == (torch.float32 if copy is None else copy.dtype)
        self.gradients = [gradient.float() for gradient in gradients]
        return torch.nn.utils.get_total_norm(self.gradients)

    def update(self, rates, scale, skip, t, decay):
        numbers = {"weight_decay": decay, "grad_scale": scale, "found_inf": skip, "eps": 1e-8}
        numbers |= {"beta1": 0.9, "beta2": 0.999, "amsgrad": False, "maximize": False}
        for i, rate in enumerate(rates.unbind()):
            lists = self.weights, self.gradients, *self.averages, [t] * len(self.weights)
            parts = [[x for x, g in zip(xs, self.groups, strict=True) if g == i] for xs in lists]
            torch._fused_adamw_(*parts[:-1], [], parts[-1], lr=rate, **numbers)
        for weight, copy in zip(self.weights, self.copies, strict=True):
            if copy is not None:
                copy.copy_(weight)


@contextlib.contextmanager
def copies_kept():
    """Within it AdamW is that of kernels, with copies in 16 bits: by TableInPyTorch."""
    table, by_kernel = ops.adamw_kernels.Table, ops.adamw_by_kernel
    ops.adamw_kernels.Table, ops.adamw_by_kernel = TableInPyTorch, lambda weight, dtype: True
    try:
        yield
    finally:
        ops.adamw_kernels.Table, ops.adamw_by_kernel = table, by_kernel


def both(runs: list[dict]) -> list[list[dict]]:
    """Each run with CUDA graphs and copies that are kept, where it keeps any; then without."""
    pairs = []
    for settings in runs:
        with copies_kept():
            captured = run(settings)
        if settings.get("use_8bit_adam"):  # which is never captured: there is nothing to compare
            pairs.append([captured, captured])
            continue
        with eager():
            folder = Path(settings["output_dir"])  # a LoRA's file is named after it
            again = settings | {"output_dir": str(folder.parent / "eager" / folder.name)}
            pairs.append([captured, run(again)])
    return pairs


def run_each(runs: list[dict]) -> list[dict]:
    with copies_kept():
        return [run(settings) for settings in runs]


def where_room_is_short(runs: list[dict]) -> list[dict]:
    """Two runs of one kind, the second with all that makes room: large is whatever there is. How
    often the UNet was moved away in each."""
    found, away = [], memory.away
    for settings, large in zip(runs, (plan.LARGE, 0), strict=True):
        moved = []

        def counted(network, wanted=True, moved=moved):
            moved.append(wanted)
            return away(network, wanted)

        with mock.patch.multiple(plan, LARGE=large), mock.patch.object(memory, "away", counted):
            found.append(run(settings) | {"away": sum(moved)})
    return found


# ---- sampling ----------------------------------------------------------------------------------

SAMPLERS = {
    "ddim": {},
    "ddim, η = 1": {"eta": 1.0},
    "ddpm": {"sampler": "ddpm"},
    "dpm++": {"sampler": "dpm++"},
    "without guidance": {"guidance_scale": 1.0},
}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu(), b.cpu())


def samplers(model: str) -> dict:
    """Whether a graph changes anything, and how often the host waited in 5 steps and in 7."""
    sd, found = load(model).to(cli.pick_device("cuda")), {}
    texts = (["a dog"] * 2, ["a cat", "the snow"])

    def draw(settings):
        return [sd.generate(text, seed=i, **settings) for i, text in enumerate(texts)]

    for name, settings in SAMPLERS.items():
        waits, kept = [], settings | {"output": "latent"}
        for steps in (5, 7):
            seen = {}
            with watched(seen), graphs.captured_unet(sd.unet):
                drawn = draw(kept | {"steps": steps})
            waits.append(sum(n for _, where, n in seen["waits"] if "graphs" not in where[0]))
        same = all(map(equal, drawn, draw(kept | {"steps": 7})))
        found[name] = {"same": same, "waits": waits, "captures": seen["captures"]}
    return found


def adapters(model: str) -> dict:
    """As grids of a LoRA in training are drawn: adapters attached, several texts of one shape."""
    sd = load(model).to(cli.pick_device("cuda"))
    made = lora.create(sd.unet, 4, 4.0, "all")
    for a in made.values():
        torch.nn.init.normal_(a.B, std=0.1)
    lora.attach(sd.unet, made)
    texts = (["a dog"] * 2, ["a cat"] * 2, ["the snow", "sks"])
    eager = [sd.generate(text, steps=6, output="latent") for text in texts]
    seen = {}
    with watched(seen), graphs.captured_unet(sd.unet):
        drawn = [sd.generate(text, steps=6, output="latent") for text in texts]
    return {"same": list(map(equal, drawn, eager)), **seen}


# ---- devices, streams and memory ---------------------------------------------------------------


def refused(function, *arguments) -> str:
    try:
        return f"not refused: {function(*arguments)}"
    except UserError as error:
        return str(error)


def devices() -> dict:
    """On two cards: which one is taken, and that it is the current one from then on."""
    found = {}
    for name in ("cuda:1", "cuda", "auto", "cuda:0", "cpu"):
        found[name] = [str(cli.pick_device(name)), torch.cuda.current_device()]
    found["cuda:2"] = refused(cli.pick_device, "cuda:2")
    count = ranks.count
    ranks.count = lambda: 2
    try:
        for number in "012":
            os.environ["LOCAL_RANK"] = number
            found[f"rank {number}"] = (
                refused(ranks.own_device, "cuda")
                if number == "2"
                else [str(ranks.own_device("auto")), torch.cuda.current_device()]
            )
        found["ranks on one"] = refused(ranks.own_device, "cuda:0")
        found["ranks on the CPU"] = str(ranks.own_device("cpu"))
    finally:
        ranks.count = count
    return found


def on_two_cards(runs: list[dict]) -> dict:
    return {"devices": devices(), "runs": run_each(runs)}


def streams(model: str) -> dict:
    """Where a captured function runs, and what the graphs of a UNet share."""
    device, seen = cli.pick_device("cuda"), []

    def function(x):
        seen.append(torch.cuda.current_stream().stream_id)
        return x + 1

    call = graphs.captured(function, device)
    results = [call(torch.full((2,), float(i), device=device)) for i in range(8)]
    found = {
        "streams": seen,
        "after": torch.cuda.current_stream().stream_id,
        "results": torch.stack(results)[:, 0].tolist(),
    }
    made, sd = [], load(model).to(device)
    graph = torch.cuda.CUDAGraph

    class Noted(graph):
        def capture_begin(self, *pool, **options):
            super().capture_begin(*pool, **options)
            made.append((self.pool()[1], torch.cuda.current_stream().stream_id))

    torch.cuda.CUDAGraph = Noted
    try:
        with graphs.captured_unet(sd.unet):
            for count in (1, 2):
                sd.generate(["a dog"] * count, steps=5, output="latent")
    finally:
        torch.cuda.CUDAGraph = graph
    return found | {"pools": made}


def advice() -> list[str]:
    """What torch warns of in an update that no graph captures; and where it forgot that it did."""
    p, heard = torch.nn.Parameter(torch.ones(4, device=cli.pick_device("cuda"))), []
    adam = optimizer.Update([(1e-2, [p])], 0.01, 1.0, scaled=False)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            p.sum().backward()
            adam.apply(1, p.detach().sum(), 1.0)
        heard.append([str(w.message) for w in caught])
        adam.adam._warned_capturable_if_run_uncaptured = False
    return heard


def memory_told() -> list[int]:
    """memory.available of 20,000 kB in all: at first, with a tensor, after that is given back, with
    another process's, with a share of 0.6; and as for a device without a number."""
    device, kb = cli.pick_device("cuda"), 1024
    pretend_card.limit(0, total=20_000 * kb)
    told = [memory.available(device)]
    x = torch.empty(4_000 * kb, dtype=torch.uint8, device=device)
    told.append(memory.available(device))
    del x
    told.append(memory.available(device))
    pretend_card.limit(0, taken=9_000 * kb)
    told.append(memory.available(device))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5, device)
    told.append(memory.available(device))
    return [size // kb for size in told]


def too_little_memory(settings: dict) -> dict:
    """A run whose memory runs out as it is recorded, with a capture that can be ended and with one
    that cannot; and one without enough for a step."""
    found, begin = {}, torch.cuda.CUDAGraph.capture_begin

    def full(self, *pool, **options):
        begin(self, *pool, **options)
        pretend_card.limit(0, total=torch.cuda.memory_allocated() + 4096)

    for name, ends in (("ended", True), ("not ended", False)):
        pretend_card.Graph.ends, pretend_card.Graph.stuck = ends, False
        pretend_card.limit(0, total=80 * pretend_card.GB)
        torch.cuda.CUDAGraph.capture_begin = full
        end = torch.cuda.CUDAGraph.capture_end

        def room_again(self, end=end):
            pretend_card.limit(0, total=80 * pretend_card.GB)
            end(self)

        torch.cuda.CUDAGraph.capture_end = room_again
        with copies_kept():
            found[name] = run(settings | {"output_dir": f"{settings['output_dir']}-{name}"})
        torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end = begin, end
    with eager():
        pretend_card.Graph.stuck = False
        found["eager"] = run(settings | {"output_dir": f"{settings['output_dir']}-eager"})
    torch.cuda.empty_cache()
    pretend_card.limit(0, total=torch.cuda.memory_allocated() + 1_500_000)
    found["none"] = run(settings | {"output_dir": f"{settings['output_dir']}-none"})
    return found


def capped() -> list:
    """bench.measure.prepared under a cap: what is held, and what then does not fit."""
    pretend_card.limit(0, total=80 * pretend_card.GB, taken=0)
    device = measure.prepared(limit=8 * pretend_card.GB)
    share = torch.cuda.get_per_process_memory_fraction(device)
    try:
        torch.empty(9 * pretend_card.GB, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        return [share, str(error)]


def several(model: str) -> dict:
    """What needs no run, in one process."""
    return {
        "samplers": samplers(model),
        "adapters": adapters(model),
        "streams": streams(model),
        "advice": advice(),
        "memory": memory_told(),
        "cap": capped(),
    }


def fitted() -> dict:
    """By card: the precision that is chosen, and the modes that SD 1.5 at 512² is trained in."""
    found, sd = {}, models.model("SD 1.5", torch.device("meta"))
    for card in (pretend_card.H100, pretend_card.T4, pretend_card.RTX_3060, pretend_card.RTX_3070):
        device = cli.pick_device("cuda")
        pretend_card.exchange(card)
        precision = Precision("auto", device).name
        config, line = fit.choose(sd, TrainConfig(), 64 * 64, precision, device, resumed=False)
        modes = [name for name in fit.MODES[-1] if getattr(config, name)]
        found[card.name] = [precision, modes, line]
    return found


# ---- programs ----------------------------------------------------------------------------------


def programs(calls: list[list[str]]) -> list[dict]:
    """Each call is a program and its options; what it printed, and its exit status. The toybox is
    scored by a fourth of its pictures, in half of the steps."""
    results, places = [], score.places
    score.places, score.SAMPLING["steps"] = lambda count: places(count // 4), 5
    for name, *options in calls:
        module, found = importlib.import_module(name), {"status": 0}
        if hasattr(module, "__path__"):  # a package
            module = importlib.import_module(f"{name}.__main__")
        sys.argv = [name, *options]
        with watched(found):
            try:
                cli.run(name, module.main)
            except SystemExit as error:
                found["status"] = error.code
        results.append(found)
    return results


# ---- kernels -----------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A resnet and a transformer of the UNet, with a norm and both kinds of attention."""

    def __init__(self):
        super().__init__()
        self.resnet = vae.ResnetBlock(16, 16, 4, 1e-5, c_temb=16)
        self.transformer = unet.Transformer(16, 4, False, [unet.TransformerBlock(16, 16, 2)])

    def forward(self, x, temb, context):
        return self.transformer(self.resnet(x, temb), context)


def kernels() -> dict:
    """Losses and norms of 5 training steps in fp16: Triton's kernels in the interpreter, replayed
    from a graph and not, and PyTorch's; and how many kernels of Triton's each replay launched."""
    device, found, launches = cli.pick_device("cuda"), {}, []
    run_one = interpreter.GridExecutor.__call__

    def counted(self, *arguments, **options):
        launches.append(self.fn.__name__)
        return run_one(self, *arguments, **options)

    interpreter.GridExecutor.__call__ = counted
    for name, mode, captured in (
        ("replayed", "triton", True),
        ("eager", "triton", False),
        ("torch", "torch", False),
    ):
        ops.use(mode)
        torch.manual_seed(0)
        net = Block().to(device, memory_format=torch.channels_last)
        adam = optimizer.Update([(1e-2, list(net.parameters()))], 0.01, 1.0, scaled=True)
        adam.allocate()
        precision = Precision("fp16", device)

        def update(step, rate, x, temb, context, net=net, adam=adam, precision=precision):
            with precision.autocast():
                loss = (net(x, temb, context).float() - x).square().mean()
            adam.start(loss, rate)
            (loss * adam.scale).backward()
            return torch.stack([loss.detach(), adam.apply(step, loss.detach(), rate)])

        call, out = graphs.captured(update, device, adam.forget) if captured else update, []
        for step in range(1, 6):
            draw = torch.Generator().manual_seed(step)
            shapes = ((1, 16, 4, 4), (1, 16), (1, 5, 16))
            drawn = [torch.randn(shape, generator=draw).to(device) for shape in shapes]
            launches.clear()
            out.append(
                call(torch.tensor(float(step)).to(device), torch.ones((), device=device), *drawn)
            )
        found[name] = torch.stack(out).tolist()
        found[f"{name} launches"] = len(launches)
    interpreter.GridExecutor.__call__ = run_one
    return found


def updates() -> dict:
    """Steps of a small network in fp16, with two learning rates: by AdamW's kernels 20 replayed
    from a graph, the first 7 of them not, the last 5 from a state on; and all by PyTorch."""
    device, found = cli.pick_device("cuda"), {}
    precision = Precision("fp16", device)

    def trained(name, steps, captured=False, state=None):
        torch.manual_seed(0)
        layers = nn.Linear(8, 16, bias=False), nn.LayerNorm(16, bias=False)
        net = nn.Sequential(*layers, nn.Linear(16, 8, bias=False)).to(device)
        groups = [(1e-2, list(net[:2].parameters())), (3e-3, list(net[2:].parameters()))]
        adam = prepare.update_of(TrainConfig(), precision, groups, [net], captured=True)
        adam.allocate()
        weights = dict(net.named_parameters())
        if state is not None:
            with torch.no_grad():
                for key, p in weights.items():
                    p.copy_(state[key])
            adam.load_state(state)

        def update(step, x):
            with adam.copies_in_place():
                with precision.autocast():
                    loss = (net(x).float() - x).square().mean()
                (loss * adam.scale).backward()
            return torch.stack([loss.detach(), adam.apply(step, loss.detach(), 1 / step)])

        call, out = graphs.captured(update, device, adam.forget) if captured else update, []
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            out.append(call(torch.tensor(float(step)).to(device), x.to(device)))
            if step == 15:
                state = {k: x.detach().clone() for k, x in (weights | adam.state()).items()}
        values = torch.cat([p.detach().flatten() for p in weights.values()])
        found[name] = {"losses": torch.stack(out).tolist(), "weights": values.tolist()}
        return state

    ops.use("triton")
    state = trained("replayed", range(1, 21), captured=True)
    trained("eager", range(1, 8))
    trained("resumed", range(16, 21), state=state)
    ops.use("torch")
    trained("torch", range(1, 21))
    return found


# ---- the first contact with a card -------------------------------------------------------------

ANY = float("-inf"), float("inf"), "the test"


def small_networks() -> None:
    """In the place of SD 1.5's, with fewer steps, and a toybox that is hardly trained."""
    two = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    unet = {"down_block_types": tiny.DOWN[2:], "up_block_types": tiny.UP[:2], "sample_size": 8}
    vae = {f"{way}_block_types": tiny.VAE_SD[f"{way}_block_types"][:2] for way in ("down", "up")}
    configs = {"unet": SD1_UNET | tiny.UNET_SD1 | two | unet}
    configs |= {"vae": SD_VAE | tiny.VAE_SD | two | vae | {"sample_size": 16}}
    configs["text_encoder"] = TEXT_CONFIG | {"hidden_size": 24, "intermediate_size": 48}
    models.CONFIGS["SD 1.5"] = configs
    few = {"max_train_steps": 2, "num_class_images": 2, "class_steps": 1, "train_batch_size": 1}
    few |= {"validation_prompt": ("a dog",), "num_validation_images": 1}
    short = toybox.default_run() | few | {"validation_inference_steps": 1}
    toybox.default_run = lambda: short
    score.SAMPLING["steps"], score.places = 1, lambda count: list(world.PLACES)
    parts.SCORES = {key: ANY for key in parts.SCORES}
    parts.STEPS = 4


def first_contact(folder: str, modes: int, own: dict | None, room: dict, eight_bit: bool) -> dict:
    """bench first, in this process, with the first `modes` of the memory's: its lines, its report
    and its exit status. `room` has the bytes that a part gets beside what is allocated, `eight_bit`
    is whether bitsandbytes is there."""
    small_networks()
    fit.MODES = fit.MODES[:modes]
    if not eight_bit:
        fit.installed = lambda mode, device: "use_8bit_adam" not in mode

    def result(module, call, seconds):
        name = next((name for name in room if name in call), None)
        if name:
            torch.cuda.empty_cache()
            pretend_card.limit(0, total=torch.cuda.memory_allocated() + room[name])
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return json.loads(json.dumps(eval(call, vars(parts))))
        except Exception as error:
            why = f"it ended with {type(error).__name__}: {first_line(error)}"
            raise measure.Failed(why) from None
        finally:
            pretend_card.limit(0, total=80 * pretend_card.GB)

    first.result, found = result, {}
    with watched(found):
        found["status"] = first.benchmark(9.5, Path(folder), own)
    found["report"] = json.loads((Path(folder) / "first.json").read_text("utf-8"))
    return found
