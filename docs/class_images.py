"""python docs/class_images.py: do class images need as many steps with another sampler?

Prints the table of docs/class_images.md: the toybox's pictures of four classes, as the judge reads
them, by sampler and number of steps. All are drawn from the same noises.
"""

from torch import Tensor

from minibooth import StableDiffusion, load
from minibooth.formats import hub
from minibooth.toybox import judge, score, world

SETTINGS = (("ddim", 50), ("ddim", 25), ("dpm++", 20), ("dpm++", 15), ("dpm++", 10))
SEEDS = (0, 1000, 2000)
NOUNS = ("dog", "cat", "teapot", "car")
COUNT = 24  # pictures of a class, per seed

CLASSES = [f"a {noun}" for noun in NOUNS for _ in range(COUNT)]
PLACED = [(noun, place) for noun in NOUNS for place in world.PLACES]


def draw(sd: StableDiffusion, prompts: list[str], sampler: str, steps: int, seed: int) -> Tensor:
    """(N, 3, 64, 64) in [-1, 1]."""
    settings = {
        "guidance_scale": score.SAMPLING["guidance_scale"],
        "batch_size": score.BATCH,
        "output": "pt",
    }
    return 2 * sd.generate(prompts, sampler=sampler, steps=steps, seed=seed, **settings) - 1


def measure(
    sd: StableDiffusion, reader: judge.Judge, sampler: str, steps: int, seed: int
) -> list[float]:
    """Class right; DIV within a class; class and place right, where a place was asked for."""
    pictures = draw(sd, CLASSES, sampler, steps, seed)
    readings, embedded = reader.look(pictures)
    right = [r["kind"] in prompt for r, prompt in zip(readings, CLASSES, strict=True)]
    diversity = [judge.diversity(part) for part in embedded.split(COUNT)]
    placed = [f"a {noun} {place}" for noun, place in PLACED]
    readings, _ = reader.look(draw(sd, placed, sampler, steps, seed))
    both = [(r["kind"], r["place"]) == asked for r, asked in zip(readings, PLACED, strict=True)]
    return [sum(x) / len(x) for x in (right, diversity, both)]


def main() -> None:
    sd, reader = load("toybox"), judge.load(hub.toybox())
    print("| sampler | steps | class right | DIV | class and place right |")
    print("| --- | --- | --- | --- | --- |")
    for sampler, steps in SETTINGS:
        rows = [measure(sd, reader, sampler, steps, seed) for seed in SEEDS]
        cells = [
            f"{sum(x) / len(x):.3f} ({min(x):.3f}–{max(x):.3f})" for x in zip(*rows, strict=True)
        ]
        print(f"| {sampler} | {steps} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
