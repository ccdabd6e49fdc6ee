"""Pictures of attention: where words look, in which steps and layers, before and after an edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from p2pz.attention import Attend, Site, plain
from p2pz.changes import Change, where
from p2pz.recording import Recorded

# Colours from 0 to 1, in equal steps. Lightness grows all the way, so they can be told apart without hues too.
RAMP = ((24, 18, 66), (44, 58, 122), (32, 104, 140), (28, 148, 132), (98, 190, 98), (190, 218, 70), (254, 240, 110))
# From -1 over 0 to 1: blue and orange, which no common colour blindness confuses.
DIFFERENCE_RAMP = ((20, 70, 150), (110, 160, 215), (246, 246, 246), (240, 160, 80), (170, 80, 0))
TILE, FONT_SIZE = 128, 13  # pixels
LANCZOS = Image.Resampling.LANCZOS

Row = Sequence[tuple[str, Image.Image]]
Words = Sequence[tuple[str, Sequence[int]]]  # with the places of their tokens, see `p2pz.tokens.words_of`
States = dict[Site, Tensor]  # [B, N, H, D], in host memory


def heat_map(
    recorded: Recorded,
    places: Sequence[int],
    branch: str | None = None,
    *,
    half: str = "conditional",
    layers: str | Callable[[Site], bool] = "",
    steps: Collection[int] | None = None,
) -> Tensor:
    """How much the positions of a picture attend to some tokens: the mean over layers, steps, heads and tokens.

    Args:
        recorded: maps.
        places: of the tokens in the padded caption, see `p2pz.tokens.places_of`.
        branch, half: whose maps. None: the first branch that was recorded, of an edit the edit itself.
        layers: part of their paths, or a test of their sites such as `p2pz.changes.where` gives.
        steps: of the recorded ones. None: all.

    Returns:
        `[h, w]` float32 of the finest chosen layer's size, to which the others are enlarged: mean probabilities.

    Raises:
        ValueError: tokens, steps, layers or a branch that were not recorded.

    Source: after Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention" (2023), section 2.2.
    """
    maps = recorded.of(branch or next(iter(recorded.maps))[0], half)
    here = where(layers) if isinstance(layers, str) else layers
    sites = [site for path, site in recorded.sites.items() if path in maps and here(site)]
    if not sites:
        raise ValueError(f"none of the recorded layers is {layers!r}: {', '.join(maps)}")
    columns = torch.tensor(_indices(recorded.tokens, places, "tokens"))
    rows = _indices(recorded.steps, recorded.steps if steps is None else steps, "steps")
    size = max((site.height, site.width) for site in sites)
    heat = torch.zeros(1, 1, *size)
    for site in sites:
        mean = maps[site.path].cpu().index_select(-1, columns)[rows].float().mean(-1)
        mean = mean.reshape(-1, 1, site.height, site.width).mean(0, keepdim=True)
        heat += F.interpolate(mean, size, mode="bilinear") / len(sites)
    return heat[0, 0]


def _indices(recorded: Sequence[int], wanted: Collection[int], what: str) -> list[int]:
    missing = [str(number) for number in wanted if number not in recorded]
    if missing or not wanted:
        raise ValueError(f"the maps have no {what} {', '.join(missing)}; recorded: {', '.join(map(str, recorded))}")
    return [recorded.index(number) for number in wanted]


# Colours and sheets.


def colour(values: Tensor, ramp: Sequence[tuple[int, int, int]] = RAMP) -> Image.Image:
    """Values `[h, w]` from 0 to 1 as colours; those outside take the colour of the nearest."""
    at = values.float().clamp(0, 1).cpu().numpy() * (len(ramp) - 1)
    channels = [np.interp(at, range(len(ramp)), channel) for channel in zip(*ramp, strict=True)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def overlay(
    picture: Image.Image, heat: Tensor, largest: float | None = None, ramp: Sequence[tuple[int, int, int]] = RAMP
) -> Image.Image:
    """A map in colours over a grey picture.

    Args:
        picture: RGB.
        heat: `[h, w]`, from 0 on; with `DIFFERENCE_RAMP` of both signs.
        largest: value of the last colour. None: the map's own largest.
        ramp: the colours.
    """
    largest = max(largest or float(heat.abs().max()), 1e-12)
    values = F.interpolate(heat[None, None].float(), picture.size[::-1], mode="bicubic")[0, 0] / largest
    values = values / 2 + 0.5 if ramp is DIFFERENCE_RAMP else values
    return Image.blend(picture.convert("L").convert("RGB"), colour(values, ramp), 0.65)


def sheet(rows: Sequence[Row], labels: Sequence[str] = (), title: str = "", legend: str = "") -> Image.Image:
    """Pictures in rows, each under its text.

    Args:
        rows: texts and pictures, which are brought to a width of `TILE` pixels.
        labels: text on the left of each row.
        title: text above all.
        legend: what the colours from first to last mean; empty: no legend.
    """
    font, line = ImageFont.load_default(FONT_SIZE), FONT_SIZE + 6
    rows = [[(text, x.resize((TILE, round(TILE * x.height / x.width)), LANCZOS)) for text, x in row] for row in rows]
    heights = [max(picture.height for _, picture in row) + line for row in rows]
    left = max((round(font.getlength(label)) + 10 for label in labels), default=4)
    width = max(left + max(map(len, rows)) * (TILE + 4), round(font.getlength(title)) + 8)
    top = line if title else 4
    made = Image.new("RGB", (width, top + sum(heights) + (line if legend else 4)), "white")
    draw = ImageDraw.Draw(made)
    draw.text((4, 2), title, "black", font)
    for row, height, label in zip(rows, heights, list(labels) or [""] * len(rows), strict=True):
        draw.text((4, top + line + (height - line - FONT_SIZE) // 2), label, "black", font)
        for i, (text, picture) in enumerate(row):
            made.paste(picture, (left + i * (TILE + 4), top + line))
            cut = next((n for n in range(len(text), 0, -1) if font.getlength(text[:n]) <= TILE), 0)
            draw.text((left + i * (TILE + 4) + 1, top + 2), text[:cut], "black", font)
        top += height
    if legend:
        made.paste(colour(torch.linspace(0, 1, 60).expand(10, 60)), (left, top + 5))
        draw.text((left + 66, top + 2), legend, "black", font)
    return made


def word_sheet(recorded: Recorded, picture: Image.Image, words: Words, branch: str | None = None) -> Image.Image:
    """Where each word looks, with the largest of its mean probabilities, which has the last colour.

    Args:
        recorded: maps.
        picture: to lay them over.
        words: words and their places.
        branch: see `heat_map`.
    """
    heats = [(word, heat_map(recorded, places, branch)) for word, places in words]
    tiles = [(f"{word}  {heat.max():.2g}", overlay(picture, heat)) for word, heat in heats]
    columns = min(len(tiles), max(4, math.ceil(len(tiles) ** 0.5)))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    return sheet(rows, title=recorded.prompt, legend="0 to each word's largest")


def step_sheet(
    recorded: Recorded, picture: Image.Image, words: Words, branch: str | None = None, columns: int = 5
) -> Image.Image:
    """Where words look as the steps go by: a row for each word, its steps in some groups."""
    parts = np.array_split(np.array(recorded.steps), min(columns, len(recorded.steps)))
    groups = [(f"step {part[0]}" if len(part) == 1 else f"steps {part[0]}-{part[-1]}", part.tolist()) for part in parts]
    return _rows(recorded, picture, words, branch, [(text, {"steps": steps}) for text, steps in groups])


def resolution_sheet(recorded: Recorded, picture: Image.Image, words: Words, branch: str | None = None) -> Image.Image:
    """Where words look in the layers of each resolution: a row for each word, from coarse to fine."""
    sizes = sorted({(site.height, site.width) for site in recorded.sites.values()})
    chosen = [(f"{w} x {h}", {"layers": lambda site, h=h, w=w: (site.height, site.width) == (h, w)}) for h, w in sizes]
    return _rows(recorded, picture, words, branch, chosen)


def _rows(
    recorded: Recorded, picture: Image.Image, words: Words, branch: str | None, chosen: Sequence[tuple[str, dict]]
) -> Image.Image:
    """A row for each word, a column for each choice of maps, a scale for each row."""
    rows = []
    for _, places in words:
        heats = [heat_map(recorded, places, branch, **choice) for _, choice in chosen]
        largest = max(float(heat.max()) for heat in heats)
        rows.append([(text, overlay(picture, heat, largest)) for (text, _), heat in zip(chosen, heats, strict=True)])
    return sheet(rows, [word for word, _ in words], recorded.prompt, "0 to the largest of a row")


def comparison_sheet(recorded: Recorded, before: Image.Image, after: Image.Image, words: Words) -> Image.Image:
    """Where words look in the reference and in the edit, and the difference: less is blue, more is orange.

    Args:
        recorded: maps of an edit, both branches.
        before, after: reconstruction (or image) and edited picture.
        words: words of the caption and their places.
    """
    change = torch.from_numpy(np.asarray(after, np.float32) - np.asarray(before, np.float32)).abs().mean(-1)
    rows = [[("image", before), ("edit", after), ("change", overlay(after, change))]]
    for _, places in words:
        old, new = (heat_map(recorded, places, branch) for branch in ("reference", "edit"))
        largest, difference = max(float(old.max()), float(new.max())), new - old
        more = overlay(after, difference, ramp=DIFFERENCE_RAMP)
        rows.append([("image", overlay(before, old, largest)), ("edit", overlay(after, new, largest))])
        rows[-1].append((f"change ± {difference.abs().max():.2g}", more))
    return sheet(rows, ["picture", *(word for word, _ in words)], recorded.prompt, "0 to the largest of a word")


# Self-attention.


def keep_states(
    kept: States, layers: str | Callable[[Site], bool], *, what: str = "k", steps: Collection[int] | None = None
) -> Change:
    """A change that changes nothing: it keeps queries, keys or values of self-attention.

    Args:
        kept: receives them.
        layers: as in `heat_map`.
        what: `"q"`, `"k"` or `"v"`.
        steps: which. None: all.

    Raises:
        ValueError: `what` is none of these.
    """
    if what not in ("q", "k", "v"):
        raise ValueError(f"what must be q, k or v, not {what!r}")
    here = where(layers, kind="self") if isinstance(layers, str) else layers

    def keep(q: Tensor, k: Tensor, v: Tensor, site: Site, attend: Attend = plain) -> Tensor:
        if here(site) and site.kind == "self" and not site.guiding and (steps is None or site.step in steps):
            kept[site] = {"q": q, "k": k, "v": v}[what].detach().float().cpu()
        return attend(q, k, v, site)

    return keep


def principal_components(states: Tensor, height: int, width: int) -> list[Image.Image]:
    """The three directions in which states differ most, as red, green and blue: what looks alike is alike to the layer.

    Args:
        states: of several pictures or steps, `[S, N, H, D]` or `[S, N, C]`, N positions row by row; the directions and
            the colours are common to all.
        height, width: of the layer, `N = height * width`.

    Source: after Tumanyan et al., "Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation" (2023),
    section 4.
    """
    flat = states.double().reshape(states.shape[0] * height * width, -1)
    flat = flat - flat.mean(0)
    directions = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :3]  # the largest eigenvalues come last
    largest = directions.abs().argmax(0)
    directions = directions * directions[largest, range(directions.shape[1])].sign()  # eigh leaves the sign to chance
    values = flat @ directions
    low, high = values.quantile(0.01, dim=0), values.quantile(0.99, dim=0)
    values = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).reshape(-1, height, width, values.shape[1])
    pixels = F.pad(values, (0, 3 - values.shape[-1])).mul(255).round().to(torch.uint8).numpy()
    return [Image.fromarray(array) for array in pixels]


def state_sheet(kept: States, image: int = 0) -> Image.Image:
    """Principal components of kept states: a row for each layer, with colours of its own, and a column for each step.

    Args:
        kept: see `keep_states`.
        image: which one of the batch.
    """
    rows, paths = [], list(dict.fromkeys(site.path for site in kept))
    for path in paths:
        sites = [site for site in kept if site.path == path]
        states = torch.stack([kept[site][image] for site in sites])
        pictures = principal_components(states, sites[0].height, sites[0].width)
        rows.append([(f"{site.branch} {site.step}", each) for site, each in zip(sites, pictures, strict=True)])
    return sheet(rows, [path.split(".transformer")[0] for path in paths], "principal components of self-attention")
